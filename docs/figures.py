"""Which figures do the documents state? Those of docs/results and the ledgers, which this renders into the documents.

    python docs/figures.py

A block of README.md or docs/*.md names what it shows and the files that it is made of:

    <!-- figures: steps docs/results/steps/8x2048.json -->
    (rendered)
    <!-- end -->

The page and the comment that `conformance report` makes of docs/results are written too.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from conformance.bench.table import Row, Spread
from conformance.case import DTYPES
from conformance.gate import ledger, schema
from conformance.page.html import page
from conformance.page.markdown import comment, table
from conformance.page.model import in_order, percent
from conformance.page.reading import FileError, read
from conformance.reporting import results_file

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/results")
BLOCK = re.compile(r"^<!-- figures: ([^\n]*) -->$\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
REPORTS = {"report.html": page, "comment.md": comment}
OURS = "fast"
STEPS = json.loads((ROOT / "examples/steps.schema.json").read_text(encoding="utf-8"))
WEIGHTS = {"": "", "4bit": ", 4-bit weights", "fp8": ", float8 weights"}  # by the last word of a trainer's name
MODES = {"lora": "", "embed": ", embeddings too", "gc": ", checkpointing", "full": ", all weights"}
RATES = {  # of a card, by their names in files, with their units in operations or bytes per second
    "copy_bytes_per_second": ("copy {} TB/s", 1e12),
    "matmul_flops_per_second": ("matrix product {} TFLOP/s", 1e12),
    "matmul_teraflops": ("matrix product {} TFLOP/s", 1),
}


class FiguresError(Exception):
    """A block or a file that cannot be rendered; the message is one line."""


def steps(*paths: Path) -> str:
    """Speed and memory of a training step at each file's size, of the trainers that all files have."""
    heads, cells = [""], defaultdict[str, list[str]](list)
    for file in map(_steps, paths):
        heads += [f"{_size(file['meta'])}: 1000 tokens/s", "peak GiB"]
        for one in sorted(file["results"], key=lambda one: -one["tokens_per_second"]):
            cells[one["what"]] += _speed(one)
    rows = [(what, *found) for what, found in cells.items() if len(found) == 2 * len(paths)]
    return table(tuple(heads), rows)


def step(path: Path) -> str:
    """All trainers of a file: speed, memory, model FLOP utilisation, and the share in which the GPU waits."""
    file = _steps(path)
    trainers = sorted(file["results"], key=lambda one: -one["tokens_per_second"])
    rows = [(one["what"], f"{one['step_ms']:.0f}", *_speed(one), *_use(one, file["meta"])) for one in trainers]
    return table((_size(file["meta"]), "ms", "1000 tokens/s", "peak GiB", "use, %", "idle, %"), rows)


def sizes(*paths: Path) -> str:
    """This trainer at each file's size and kind of weights, beside the fastest other trainer with such weights."""
    files = [_steps(path) for path in paths]
    rows: list[tuple[str, ...]] = []
    for file in sorted(files, key=lambda file: [file["meta"][name] for name in ("shape", "mode", "gpus", "rows")]):
        meta, fastest = file["meta"], sorted(file["results"], key=lambda one: -one["tokens_per_second"])
        for kind, words in WEIGHTS.items():
            ours, others = ([one for one in fastest if _kind(one["who"]) == (mine, kind)] for mine in (True, False))
            for one in ours:
                about = f"{meta['shape']}, {_size(meta)}{MODES[meta['mode']]}{words}"
                about += f", {meta['gpus']} GPUs" * (meta["gpus"] > 1)
                ratio = f"{one['tokens_per_second'] / others[0]['tokens_per_second']:.2f}" if others else ""
                best = (others[0]["who"], *_speed(others[0])) if others else ("", "", "")
                rows.append((about, *_speed(one), *_use(one, meta), *best, ratio))
    return table(
        ("", "1000 tokens/s", "peak GiB", "use, %", "idle, %", "best other", "1000 tokens/s", "peak GiB", "ratio"), rows
    )


def operations(*paths: Path) -> str:
    """Times of a bench by shape: ours beside the fastest other backend with correct results.

    Each file holds other operations, so that the backends of an operation were timed in one run.
    """
    groups: dict[tuple[Path, str, str], list[Row]] = {}
    for path in paths:
        for row in read(path).rows:
            groups.setdefault((path, row.op, row.shape), []).append(row)
    lines: list[tuple[str, ...]] = []
    for (path, op, shape), rows in groups.items():
        ours = next((row for row in rows if row.backend == OURS), None)
        if ours is None or ours.wrong is not None or ours.full is None:
            raise FiguresError(
                f"{path}: {op} {shape}: got no correct time of {OURS}; allowed: a bench of correct kernels"
            )
        others = [row for row in rows if row is not ours and row.wrong is None]
        shares = [ours.roofline.get(name) for name in ("device_forward", "device_backward")]
        shares = [share for share in shares if share is not None] or [ours.roofline["full"]]
        device = _ms(ours.device_full), _fastest(others, lambda row: row.device_full)
        call = _ms(ours.full), _fastest(others, lambda row: row.full)
        memory = "" if ours.peak_mebibytes is None else f"{ours.peak_mebibytes:.0f}"
        lines.append((f"{op} {shape}", *device, " / ".join(f"{100 * share:.0f}" for share in shares), *call, memory))
    return table(("", "device", "best other", "%", "call", "best other", "MiB"), lines)


def budget(path: Path) -> str:
    """The largest budget use of each operation and dtype that a ledger records."""
    card = ledger.read(path)
    entries = [one for one in card.entries.values() if one["kind"] == "property" and one["dtype"]]
    entries = [one for one in entries if one["backend"] == OURS and one["budget_use"] is not None]
    dtypes = in_order((one["dtype"] for one in entries), list(DTYPES))
    largest: dict[tuple[str, str], float] = {}
    for one in entries:
        which = one["op"], one["dtype"]
        largest[which] = max(one["budget_use"], largest.get(which, 0.0))
    rows = [(op, *(percent(largest.get((op, dtype))) for dtype in dtypes)) for op in sorted({op for op, _ in largest})]
    return table((f"operation, on {card.card}", *dtypes), rows)


def fingerprints(path: Path) -> str:
    """The most registers and bytes of stack of a thread in any kernel of each operation, by target."""
    entries = [one for one in ledger.read(path).entries.values() if one["kind"] == "fingerprint"]
    entries = [one for one in entries if one["backend"] == OURS]
    targets = sorted({one["target"] for one in entries}, key=lambda name: (name[:3] != "sm_", len(name), name))
    found = defaultdict[tuple[str, str], list[Any]](list)
    for one in entries:
        found[one["op"], one["target"]].append(one)
    most = {which: [max(one[name] for one in ones) for name in ("registers", "stack")] for which, ones in found.items()}
    cells = {which: f"{registers}" + f" + {stack}" * (stack > 0) for which, (registers, stack) in most.items()}
    ops = sorted({op for op, _ in found})
    return table(("", *targets), [(op, *(cells.get((op, target), "") for target in targets)) for op in ops])


def measured(*paths: Path) -> str:
    """The card, the versions and the commit of files, those that share them in one row."""
    groups = defaultdict[tuple[str, ...], list[tuple[str, dict[str, float]]]](list)
    for path in paths:
        meta = json.loads(path.read_text())["meta"]
        versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
        when = f"commit {meta['commit'][:12]}" if meta.get("commit") else meta.get("measured", "not recorded")
        rates = {name: (meta.get(name) or 0) / unit for name, (_, unit) in RATES.items()}
        groups[meta["gpu"] or meta["device"], versions, when].append((f"`{path.name}`", rates))
    rows: list[tuple[str, ...]] = []
    for (card, versions, when), files in groups.items():
        found = [(words, [rates[name] for _, rates in files if rates[name]]) for name, (words, _) in RATES.items()]
        about = [words.format(_range(rates)) for words, rates in found if rates]
        rows.append((", ".join(name for name, _ in files), ", ".join([card, *about]), versions, when))
    return table(("files", "card", "versions", "measured at"), rows)


RENDERERS: dict[str, Callable[..., str]] = {
    one.__name__: one for one in (steps, step, sizes, operations, budget, fingerprints, measured)
}


def rendered(text: str, root: Path = ROOT) -> str:
    """A document with its blocks rendered from their files.

    Raises:
        FiguresError: a block has no renderer or no source, or is not closed.
    """

    def block(match: re.Match[str]) -> str:
        name, *files = match[1].split()
        paths = [path for file in files for path in sorted(root.glob(file))]
        if name not in RENDERERS:
            raise FiguresError(f"figures: got {name!r}; allowed: {', '.join(RENDERERS)}")
        if not paths or not all(any(root.glob(file)) for file in files):
            raise FiguresError(f"figures: {name}: got {' '.join(files) or 'no file'}; allowed: files that exist")
        return f"<!-- figures: {match[1]} -->\n\n{RENDERERS[name](*paths)}\n\n<!-- end -->"

    if text.count("<!-- figures:") != len(BLOCK.findall(text)):
        raise FiguresError("figures: got a block without <!-- end -->; allowed: one line begins it, one line ends it")
    return BLOCK.sub(block, text)


def reports(root: Path = ROOT) -> dict[Path, str]:
    """The page and the comment of the committed results, by path."""
    files = [read(path) for path in sorted((root / RESULTS).glob("*.json"))]
    return {root / RESULTS / name: make(files) for name, make in REPORTS.items()}


def documents(root: Path = ROOT) -> list[Path]:
    """The documents that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main() -> int:
    """Write each file that differs and print its name; return 2 if something cannot be rendered."""
    try:
        texts = {path: rendered(path.read_text(encoding="utf-8")) for path in documents()} | reports()
    except (FiguresError, FileError, ledger.LedgerError) as error:
        print(error, file=sys.stderr)
        return 2
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            results_file.write_text(path, text)
            print(f"{path.relative_to(ROOT)}: written")
    return 0


def _steps(path: Path) -> dict[str, Any]:
    """A file of the step benchmark."""
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FiguresError(f"{path}: got no JSON ({error}); allowed: what examples/step_benchmark.py wrote") from error
    if found := schema.problem(file, STEPS, STEPS):
        raise FiguresError(f"{path}: {found}")
    return file


def _size(meta: dict[str, Any]) -> str:
    return f"{meta['rows']} x {meta['length']}"


def _speed(one: dict[str, Any]) -> tuple[str, str]:
    return f"{one['tokens_per_second'] / 1e3:.1f}", f"{one['peak_gib']:.1f}"


def _use(one: dict[str, Any], meta: dict[str, Any]) -> tuple[str, ...]:
    """The model FLOP utilisation and the idle share, in percent."""
    rate = meta["matmul_teraflops"]
    use = one["teraflops"] / rate if one["teraflops"] and rate else None
    return tuple("" if share is None else f"{100 * share:.0f}" for share in (use, one["idle_share"]))


def _kind(who: str) -> tuple[bool, str]:
    """Whether a trainer is this one, and the kind of its weights."""
    last = who.rpartition("-")[2]
    return who.partition("-")[0] == OURS, last if last in WEIGHTS else ""


def _range(numbers: list[float]) -> str:
    least, most = (f"{number:.3g}" for number in (min(numbers), max(numbers)))
    return least if least == most else f"{least} to {most}"


def _ms(times: Spread | None) -> str:
    """The median in milliseconds, three digits."""
    return "" if times is None else f"{times[1]:.3f}" if times[1] < 1 else f"{times[1]:.3g}"


def _fastest(rows: Iterable[Row], times: Callable[[Row], Spread | None]) -> str:
    timed = [(spread, row) for row in rows if (spread := times(row)) is not None]
    if not timed:
        return ""
    spread, row = min(timed, key=lambda one: one[0][1])
    return f"{_ms(spread)} {row.backend}" + ", in place" * ("writes over" in (row.remark or ""))


if __name__ == "__main__":
    raise SystemExit(main())

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

from conformance import results_file
from conformance.bench.table import Row, Spread
from conformance.case import DTYPES
from conformance.gate import ledger
from conformance.page.html import page
from conformance.page.markdown import comment, table
from conformance.page.model import in_order, percent
from conformance.page.reading import FileError, read

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/results")
BLOCK = re.compile(r"^<!-- figures: ([^\n]*) -->$\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
REPORTS = {"report.html": page, "comment.md": comment}
OURS = "fast"


class FiguresError(Exception):
    """A block or a file that cannot be rendered; the message is one line."""


def steps(*paths: Path) -> str:
    """Speed and memory of a training step at each file's size, of the trainers that all files have."""
    heads, cells = [""], defaultdict[str, list[str]](list)
    for path in paths:
        file = json.loads(path.read_text())
        size = f"{file['meta']['rows']} x {file['meta']['length']}"
        heads += [f"{size}: 1000 tokens/s", "peak GiB"]
        for one in sorted(file["results"], key=lambda one: -one["tokens_per_second"]):
            cells[one["what"]] += f"{one['tokens_per_second'] / 1e3:.1f}", f"{one['peak_gib']:.1f}"
    rows = [(what, *found) for what, found in cells.items() if len(found) == 2 * len(paths)]
    return table(tuple(heads), rows)


def utilisation(path: Path) -> str:
    """The time of a training step, its model FLOP utilisation, and the share in which the GPU waits."""
    file = json.loads(path.read_text())
    trainers = sorted(file["results"], key=lambda one: one["step_ms"])
    shares = [(one["teraflops"] / file["meta"]["matmul_teraflops"], one["idle_share"]) for one in trainers]
    rows = [
        (one["what"], f"{one['step_ms']:.0f}", *(f"{100 * share:.0f}" for share in found))
        for one, found in zip(trainers, shares, strict=True)
    ]
    return table(("", "ms", "use, %", "idle, %"), rows)


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
        if ours is None or ours.red is not None or ours.full is None:
            raise FiguresError(
                f"{path}: {op} {shape}: got no correct time of {OURS}; allowed: a bench of correct kernels"
            )
        others = [row for row in rows if row is not ours and row.red is None]
        shares = [ours.roofline.get(name) for name in ("device_forward", "device_backward")]
        shares = [share for share in shares if share is not None] or [ours.roofline["full"]]
        device = _ms(ours.device_full), _fastest(others, lambda row: row.device_full)
        call = _ms(ours.full), _fastest(others, lambda row: row.full)
        lines.append((f"{op} {shape}", *device, " / ".join(f"{100 * share:.0f}" for share in shares), *call))
    return table(("", "device", "best other", "%", "call", "best other"), lines)


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


def measured(*paths: Path) -> str:
    """The card, the versions and the commit of each file."""
    rows: list[tuple[str, ...]] = []
    for path in paths:
        meta = json.loads(path.read_text())["meta"]
        versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
        rates = [f"copy {meta['copy_bytes_per_second'] / 1e12:.2f} TB/s"] if "copy_bytes_per_second" in meta else []
        if "matmul_flops_per_second" in meta:
            rates.append(f"matrix product {meta['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s")
        when = f"commit {meta['commit'][:12]}" if meta.get("commit") else meta.get("measured", "not recorded")
        rows.append((f"`{path.name}`", ", ".join([meta["gpu"] or meta["device"], *rates]), versions, when))
    return table(("file", "card", "versions", "measured at"), rows)


RENDERERS: dict[str, Callable[..., str]] = {
    one.__name__: one for one in (steps, utilisation, operations, budget, measured)
}


def rendered(text: str, root: Path = ROOT) -> str:
    """A document with its blocks rendered from their files.

    Raises:
        FiguresError: a block has no renderer or no source, or is not closed.
    """

    def block(match: re.Match[str]) -> str:
        name, *files = match[1].split()
        paths = [root / file for file in files]
        if name not in RENDERERS:
            raise FiguresError(f"figures: got {name!r}; allowed: {', '.join(RENDERERS)}")
        if not paths or not all(path.is_file() for path in paths):
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


def _ms(times: Spread | None) -> str:
    """The median in milliseconds, three digits."""
    return "" if times is None else f"{times[1]:.3f}" if times[1] < 1 else f"{times[1]:.3g}"


def _fastest(rows: Iterable[Row], times: Callable[[Row], Spread | None]) -> str:
    timed = [(spread, row) for row in rows if (spread := times(row)) is not None]
    if not timed:
        return ""
    spread, row = min(timed, key=lambda one: one[0][1])
    return f"{_ms(spread)} {row.backend}" + ", in place" * ("writes over" in (row.note or ""))


if __name__ == "__main__":
    raise SystemExit(main())

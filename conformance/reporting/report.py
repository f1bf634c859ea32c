"""The output of a run: a progress bar, a table, failures with a command that reproduces them, and JSON."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from statistics import mean

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conformance import calling, operations
from conformance.backends import OPERATIONS, PIECES, Judged
from conformance.case import Case
from conformance.operations import PROJECT, Source
from conformance.peers import PACKAGES
from conformance.properties import PROPERTIES
from conformance.reporting import results_file
from conformance.reporting.results_file import commit, versions
from conformance.running.runner import Work
from conformance.running.search import Result
from conformance.spec import Spec
from unsloth_ref.checks import counted

CELL_WIDTH = 17
SO_FAR = " (so far: the time for finding a smaller one ran out)"
# What each gate asks, for readers of a failure; conformance/tolerances/gates.py derives them.
GATES = {
    "gate G0": "shape, dtype and digits, and NaN, infinity and integers must be those of the reference",
    "gate G1": "no element may be further from the reference in float64 than rounding explains",
    "gate G2": "all elements together must be about as accurate as the reference run in the same dtype",
    "gate G3": "rounding errors must not lean to one side",
}


def name_width(names: Iterable[str]) -> int:
    """The width of a column of names."""
    return 1 + max(map(len, (*names, *OPERATIONS, *PIECES)))


def heading(judged: Judged, device: str, profile: str, source: Source = PROJECT) -> str:
    """One line: backend, reference, versions, device, profile; then what is known of an operation of your own."""
    where = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    release = torch.__version__.split("+")[0]
    reference = source.reference or source.spec or "reference"
    line = f"backend {judged.description} against {reference}, torch {release}{where}, profile {profile}"
    if not source:
        return line
    return "\n".join([line, *(learned(spec) for spec in operations.specs(source).values())])


def learned(spec: Spec) -> str:
    """Describe in a few lines what the judge draws for an operation of the command line."""
    case = Case(tuple((name, getattr(size, "example", 1)) for name, size in spec.drawing.sizes.items()))
    drawn, always = spec.drawing.options, spec.drawing.required(case)
    varied = {*drawn, *always, *calling.grouped(spec.inputs(case, torch.float32, "cpu"))}
    parameters = inspect.signature(spec.reference).parameters.values()
    options = [
        f"{name} {', '.join(map(str, values))}{' (added)' * (name in spec.drawing.added)}"
        for name, values in drawn.items()
    ]
    options += [f"{name} {_followed(spec, case, name) or always[name]}" for name in always if name not in drawn]
    lines: dict[str, Iterable[str]] = {
        "sizes": [f"{name} {size}" for name, size in spec.drawing.sizes.items() if hasattr(size, "example")],
        "options": options,
        "not varied": [
            f"{p.name}={p.default}" for p in parameters if p.default is not p.empty and p.name not in varied
        ],
        "outputs": spec.outputs,
        "gradients": spec.grads or ["none"],
    }
    return "\n".join(f"  {what:<10} {', '.join(words)}" for what, words in lines.items() if words)


def _followed(spec: Spec, case: Case, option: str) -> str:
    """The sizes that the value of an option changes with, in words; empty if there are none."""
    value = spec.drawing.required(case)[option]
    sizes = [name for name, n in case.sizes if spec.drawing.required(case.resized(**{name: n + 1}))[option] != value]
    return f"as {' and '.join(sizes)}" if sizes else ""


class Table:
    """One row per operation, piece or model, printed when its last task is done; on a terminal a progress bar below."""

    _last_columns = f"{'coverage':<17}cases"

    def __init__(
        self, tasks: Sequence[Work], ops: Sequence[str], dtypes: Sequence[str], checked: str = "properties"
    ) -> None:
        """One row per name in `ops`, printed in any order; one column per dtype; `checked` names what was checked."""
        self._checked = checked
        self._left, self._ops, self._dtypes = Counter(task.op for task in tasks), list(ops), dtypes
        self._width = name_width(ops)
        self._results: dict[str, list[Result]] = {op: [] for op in ops}
        columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
        self._progress = self._bar.add_task("", total=len(tasks))

    def __enter__(self) -> Table:
        """Print the column headings."""
        dtypes = "".join(f"{dtype:<{CELL_WIDTH}}" for dtype in self._dtypes)
        self._print(f"{'% of error budget':<{self._width}}{dtypes}{self._checked:<13}{self._last_columns}")
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Remove the progress bar, print the remaining rows; of a stopped run those that have results."""
        self._bar.stop()
        for op in [op for op in self._ops if self._left[op] >= 0]:
            if self._results[op] or not self._left[op]:
                self._print(self._row(op))

    def add(self, task: Work, result: Result) -> None:
        """Record the result of a task."""
        self._bar.advance(self._progress)
        self._results[task.op].append(result)
        self._left[task.op] -= 1
        if self._left[task.op] == 0:
            self._left[task.op] = -1  # printed
            self._print(self._row(task.op))

    def _print(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _row(self, op: str) -> str:
        results = [result for result in self._results[op] if result.verdict != "skip"]
        if not results:
            why = self._all_skipped(self._results[op]) if self._results[op] else "not defined by this backend"
            return f"{op:<{self._width}}-  {why}"
        if results[0].dtype is None:
            cells = f"{_cell(results):<{CELL_WIDTH * len(self._dtypes)}}"
        else:
            cells = "".join(f"{_cell([r for r in results if r.dtype == d]):<{CELL_WIDTH}}" for d in self._dtypes)
        properties = {result.property for result in results}
        passed = properties - {result.property for result in results if result.verdict != "pass"}
        held = f"{len(passed)}/{len(properties)}"
        return f"{op:<{self._width}}{cells}{held:<13}{self._last(self._results[op])}".rstrip()

    def _all_skipped(self, results: Sequence[Result]) -> str:
        """What a row says if nothing was judged."""
        return f"all {self._checked} skipped"

    def _last(self, results: Sequence[Result]) -> str:
        """The last columns of a row."""
        run = [result for result in results if result.verdict != "skip"]
        return f"{_coverage(run):<17}{sum(result.examples for result in run):,}".replace(",", " ")


def _coverage(results: Sequence[Result]) -> str:
    """The share of the explored pairs that any property ran, then the mean of the properties that draw cases."""
    found = [(result, result.reached) for result in results if result.reached]
    if not found:
        return "-"
    any_ran = [reduce(or_, (one for r, one in found if r.dtype == d)) for d in {r.dtype for r, _ in found}]
    pairs = sum(one.pairs.bit_count() for one in any_ran) / sum(one.explored for one in any_ran)
    drawn = [one.share for r, one in found if r.property in PROPERTIES and PROPERTIES[r.property].cases is None]
    return f"{100 * pairs:.0f} %" + (f", mean {100 * mean(drawn):.0f} %" if drawn else "")


def _cell(results: Sequence[Result]) -> str:
    used = [result.budget_use for result in results if result.budget_use is not None and result.verdict != "xfail"]
    percent = f"{100 * max(used):.3g} %" if used else ""
    verdicts = {result.verdict for result in results}
    verdict = "FAIL" if "fail" in verdicts else "known " if "xfail" in verdicts else "ok"
    return f"{verdict:<5}{percent}"


# Words of a message, what helps then, and whether that fits the device and the source of the operation.
_HINTS: tuple[tuple[str, str, Callable[[str, Source], bool]], ...] = (
    (
        r"(?i)raised .*(cuda|gpu|active drivers|inline_asm)",
        "the kernel needs a GPU, and Triton's interpreter ran it on a CPU; --device cuda judges it on a GPU",
        lambda device, source: device == "cpu",
    ),
    (
        r"has no graph, although",
        "--grads none judges the results of an operation that has no backward pass",
        lambda device, source: bool(source),
    ),
)


def hints_of(message: str, device: str, source: Source) -> list[str]:
    """What helps with a failure that has this message."""
    return [text for words, text, fits in _HINTS if fits(device, source) and re.search(words, message)]


def failures(
    results: Sequence[Result],
    backend: str,
    device: str,
    source: Source = PROJECT,
    statements: Mapping[str, str] | None = None,
) -> str:
    """Every failure with its message, its smallest case and the command that reproduces it.

    Args:
        results: of any verdict.
        backend, device, source: of the command that reproduces a case.
        statements: what must hold, by name; None for those of the properties.
    """
    if statements is None:
        statements = {name: prop.statement for name, prop in PROPERTIES.items()}
    paragraphs = []
    for result in results:
        if result.verdict != "fail":
            continue
        first, *rest = (result.message or "").split("\n")
        dtype = (result.dtype,) if result.dtype else ()
        line = " ".join((result.op, *dtype, result.property, str(result.case)))
        again = [
            f"  smallest case: {result.case}{SO_FAR * result.cut_short}",
            f"  reproduce:     {repro(line, backend, device, source.words())}",
        ]
        asks = [f"  {gate} asks: {text}" for gate, text in GATES.items() if gate in (result.message or "")]
        holds = statements.get(result.property)
        hints = hints_of(first, device, source)
        paragraphs.append(
            "\n".join(
                [
                    f"FAIL {' / '.join((result.op, result.property, *dtype))}: {first}",
                    *(f"  {text}" for text in rest),
                    *asks,
                    *([f"  must hold:     {holds}"] if holds else ()),
                    *(again if result.case else ()),
                    *(f"  hint:          {text}" for text in hints),
                ]
            )
        )
    return "\n\n".join(paragraphs)


def repro(line: str, backend: str, device: str, words: Sequence[str]) -> str:
    """The command that runs a case again; the words are the options that name an operation of your own."""
    where = "".join(f" {shlex.quote(word)}" for word in words)
    where += f" --backend {shlex.quote(backend)}" * (backend != "fast") + f" --device {shlex.quote(device)}"
    return f"python -m conformance repro{where} {shlex.quote(line)}"


def closing(results: Sequence[Result]) -> str:
    """One line: how many checks failed, and before it each failure that was expected."""
    known = [result for result in results if result.verdict == "xfail"]
    lines = [
        f"known {' / '.join((result.op, result.property, *((result.dtype,) if result.dtype else ())))}:"
        f" {(result.message or '').partition(chr(10))[0].removeprefix('expected: ')}"
        for result in known
    ]
    run = [result for result in results if result.verdict != "skip"]
    failed = sum(result.verdict == "fail" for result in run)
    skipped = len(results) - len(run)
    line = f"{failed} of {len(run)} checks failed" + (f", {skipped} skipped" if skipped else "")
    return "\n".join([*lines, line + (f", {counted(len(known), 'known deviation')}" if known else "")])


def _all_names(source: Source) -> list[str]:
    return [*operations.specs(source), *(() if source else PIECES)]


def write_json(
    path: Path, results: Sequence[Result], judged: Judged, device: str, profile: str, source: Source = PROJECT
) -> None:
    """Write the results as JSON."""
    package = PACKAGES.get(judged.name)
    meta = {
        "versions": versions() | ({package: version(package)} if package else {}),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "backend": judged.name,
        "profile": profile,
        "source": source.words(),
        "commit": commit(),
        "not_defined": [op for op in _all_names(source) if op not in judged.functions],
    }
    results_file.write(path, meta, [result.as_dict() for result in results])

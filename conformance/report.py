"""What a run shows: a progress bar, a table, failures with a line that reproduces them, JSON for machines."""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conformance.backends import OPERATIONS, Judged
from conformance.search import Result

NAME_WIDTH, CELL_WIDTH = 20, 17


def progress() -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def heading(judged: Judged, device: str, profile: str) -> str:
    """One line: who is judged, against what, on what."""
    where = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    version = torch.__version__.split("+")[0]
    return f"backend {judged.description} against reference, torch {version}{where}, profile {profile}"


def table(results: Sequence[Result], ops: Sequence[str], dtypes: Sequence[str]) -> str:
    """One row an operation: worst budget use a dtype, laws that hold, cases run."""
    lines = [" " * NAME_WIDTH + "".join(f"{dtype:<{CELL_WIDTH}}" for dtype in dtypes) + f"{'properties':<13}cases"]
    for op in ops:
        own = [result for result in results if result.op == op and result.verdict != "skip"]
        if not own:
            defined = any(result.op == op for result in results)
            lines.append(
                f"{op:<{NAME_WIDTH}}-  {'every property skipped' if defined else 'not defined by this backend'}"
            )
            continue
        cells = "".join(f"{_cell([r for r in own if r.dtype == dtype]):<{CELL_WIDTH}}" for dtype in dtypes)
        laws = {result.property for result in own}
        held = laws - {result.property for result in own if result.verdict == "fail"}
        cases = f"{sum(result.examples for result in own):,}".replace(",", " ")
        lines.append(f"{op:<{NAME_WIDTH}}{cells}{f'{len(held)}/{len(laws)}':<13}{cases}")
    return "\n".join(lines)


def _cell(results: Sequence[Result]) -> str:
    used = [result.budget_use for result in results if result.budget_use is not None]
    percent = f"{100 * max(used):.3g} %" if used else ""
    verdict = "FAIL" if any(result.verdict == "fail" for result in results) else "ok"
    return f"{verdict:<5}{percent}"


def failures(results: Sequence[Result], backend: str, device: str) -> str:
    """Every failure with its message, its smallest case, and the command that reproduces it."""
    paragraphs = []
    for result in results:
        if result.verdict != "fail":
            continue
        first, *rest = (result.message or "").split("\n")
        where = f" --backend {backend}" * (backend != "fast") + f" --device {device}" * (device != "cpu")
        line = f"{result.op} {result.dtype} {result.property} {result.case}"
        paragraphs.append(
            "\n".join(
                [
                    f"FAIL {result.op} / {result.property} / {result.dtype}: {first}",
                    *(f"  {text}" for text in rest),
                    f"  smallest case: {result.case}",
                    f"  reproduce:     python -m conformance repro{where} '{line}'",
                ]
            )
        )
    return "\n\n".join(paragraphs)


def closing(results: Sequence[Result]) -> str:
    """One line: how many checks failed."""
    run = [result for result in results if result.verdict != "skip"]
    failed = sum(result.verdict == "fail" for result in run)
    skipped = len(results) - len(run)
    return f"{failed or 'none'} of {len(run)} checks failed" + (f", {skipped} need CUDA" if skipped else "")


def write_json(path: Path, results: Sequence[Result], judged: Judged, device: str, profile: str) -> None:
    """The same for machines."""
    meta = {
        "versions": versions(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "backend": judged.description,
        "profile": profile,
        "commit": _commit(),
        "not_defined": [op for op in OPERATIONS if op not in judged.functions],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "results": [result.as_dict() for result in results]}, indent=1) + "\n")


def versions() -> dict[str, Any]:
    """Versions of what a result depends on."""
    triton = sys.modules.get("triton")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None

"""The part of docs/judge-power.md about automatic mutants: how many the judge finds, and why not the others."""

import json
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.page.markdown import table

Json = Mapping[str, Any]

INTRODUCTION = """
## Automatic mutants

`python -m conformance mutate` changes the source of a kernel, one expression at a time;
[judge.md](judge.md#plant-faults) explains the verdicts. Equivalent are the mutants that were read and confirmed to be
no faults, and launch parameters that change no bit of any result. A mutant of code that several operations use counts
under the operation that found it.
"""
FOUND, NO_FAULT = ("killed", "raised"), ("equivalent", "same bits")


def brief(file: Json, note: str = "") -> str:
    """What the document needs of a file that `mutate --json` wrote, with a note on how the mutants were examined."""
    results = [
        json.dumps(
            {
                **{name: one[name] for name in ("op", "mutant", "kind", "verdict")},
                "property": one["killed_by"][0][0] if one["killed_by"] else None,
            }
        )
        for one in file["results"]
    ]
    meta, lines = json.dumps({**file["meta"], "note": note}), ",\n".join(results)
    return f'{{"meta": {meta}, "results": [\n{lines}\n]}}\n'


def reasons(path: Path) -> dict[str, str]:
    """By the name of a mutant, why it survives."""
    return {one["mutant"]: one["reason"] for one in tomllib.loads(path.read_text(encoding="utf-8"))["survivor"]}


def section(files: Sequence[Json], why: Mapping[str, str]) -> list[str]:
    """The paragraphs; none without files.

    Args:
        files: what `mutate --json` wrote, or `brief` of it.
        why: by the name of a mutant, why it survives.
    """
    parts = [INTRODUCTION] if files else []
    for file in files:
        parts += [textwrap.fill(_sample(file["meta"]), 120), _counts(file["results"])]
        survivors = [one for one in file["results"] if one["verdict"] not in (*FOUND, *NO_FAULT)]
        if survivors:
            names = [f"- {one['op']}, mutant {one['mutant'].rpartition('/')[2]}" for one in survivors]
            items = [f"{name}: {why[one['mutant']]}" for name, one in zip(names, survivors, strict=True)]
            parts += ["Survivors, and why no property finds them:", "\n".join(map(_wrapped, items))]
    return parts


def _wrapped(item: str) -> str:
    return textwrap.fill(item, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _sample(meta: Json) -> str:
    """Where, with what and of which commit the mutants were drawn and examined."""
    software = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
    drawn = f"{meta['sample']} per operation, drawn with seed {meta['seed']}" if meta["sample"] else "all"
    device = {"cuda": "a CUDA device", "cpu": "a CPU"}[meta["device"]]
    return (
        f"On {device} ({software}), commit {meta['commit'][:7]}, profile `{meta['profile']}`,"
        f" {', '.join(meta['dtypes'])}: {drawn}. {meta.get('note', '')}".strip()
    )


def _counts(results: Sequence[Json]) -> str:
    """A row for each operation, and one for all."""
    rows = []
    for op in [*sorted({one["op"] for one in results}), "all"]:
        verdicts = [one["verdict"] for one in results if op in (one["op"], "all")]
        killed, equivalent = (sum(verdict in those for verdict in verdicts) for those in (FOUND, NO_FAULT))
        judged = len(verdicts) - equivalent
        rate = f"{100 * killed / judged:.1f} %" if judged else "-"
        rows.append([op, *map(str, (len(verdicts), equivalent, killed, judged - killed)), rate])
    return table(["operation", "mutants", "equivalent", "killed", "survived", "killed of those not equivalent"], rows)

"""`conformance bisect`: find the smallest set of operations or modules that makes a model break its gates."""

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.laws import LAWS
from conformance.models.task import ModelTask, quiet, trial_of
from conformance.reporting import results_file
from conformance.running.catalogue import UsageError
from conformance.tolerances.gates import Unchecked
from conformance.verbs import model
from conformance.verbs._shared import Verbs, add_verb

if TYPE_CHECKING:
    from conformance.models.bisecting import SmallestSet
    from unsloth_fast.shadow import Finding


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "bisect", "find the operations or modules that make a model break its gates")
    model.add_subject(parser)
    parser.add_argument("--only", nargs="+", action="extend", metavar="X", help="try this set alone, as a result names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.set_defaults(verb=_bisect, law=[*LAWS][:1], jobs=1)  # one task for each model and dtype


def _bisect(arguments: argparse.Namespace) -> int:
    tasks = model.tasks_asked(arguments)
    if len(tasks) != 1:
        raise UsageError(f"bisect: got {len(tasks)} of models and dtypes; allowed: one of each")
    (task,) = tasks
    print(model.heading(task), flush=True)
    with quiet():
        calls, found = _searched(task, arguments.only)
    if arguments.only:
        named = set(arguments.only)
        calls = [one for one in calls if {one.operation, one.module, f"{one.operation}@{one.module}"} & named]
    lines = [_of_call(one, task) for one in calls] + [_of_set(one, task) for one in found]
    print("", *lines, sep="\n" if lines else "")
    print("" if lines else "nothing breaks: every call and the whole model stay within the budget")
    if arguments.json:
        _write(arguments.json, calls, found, task)
    return 1 if lines else 0


def _searched(task: ModelTask, only: Sequence[str] | None) -> "tuple[list[Finding], list[SmallestSet]]":
    """The calls that break their own gates, and the smallest sets that break those of the model."""
    from conformance.models.bisecting import Bisection
    from conformance.models.building import NotBuilt

    try:
        bisection = Bisection(trial_of(task), lambda line: print(f"tried  {line}", flush=True))
        return list(bisection.calls()), list(_only(bisection, only) if only else bisection.search())
    except (NotBuilt, Unchecked) as why:
        raise UsageError(f"bisect: {' '.join(str(why).split())}") from why


def _only(bisection: Any, members: Sequence[str]) -> "list[SmallestSet]":
    try:
        found = bisection.only(members)
    except KeyError as error:
        raise UsageError(f"--only: got {' '.join(members)}; allowed: {error.args[0]}, all of one kind") from error
    return [] if found is None else [found]


def _again(members: Sequence[str], task: ModelTask) -> str:
    words = [*(["--config"] if task.random else []), task.op, "--dtype", task.dtype, "--backend", task.backend]
    words += ["--device", task.device, *(["--data", str(task.data)] if task.data else []), "--only", *members]
    return f"python -m conformance bisect {shlex.join(words)}"


def _of_call(one: "Finding", task: ModelTask) -> str:
    return f"call: {one}\nreproduce: {_again([f'{one.operation}@{one.module}'], task)}\n"


def _of_set(one: "SmallestSet", task: ModelTask) -> str:
    return f"{one.kind}: {', '.join(one.members)}\n{one.message}\nreproduce: {_again(one.members, task)}\n"


def _write(path: Path, calls: "Sequence[Finding]", found: "Sequence[SmallestSet]", task: ModelTask) -> None:
    results = [
        {"kind": "call", **_finite(asdict(one)), "reproduce": _again([f"{one.operation}@{one.module}"], task)}
        for one in calls
    ]
    results += [{**_finite(asdict(one)), "reproduce": _again(one.members, task)} for one in found]
    meta = model.meta_of(task) | {"model": task.op, "random": task.random, "dtype": task.dtype}
    results_file.write(path, meta, results)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity; the share of the budget has the name that other verbs give it."""
    values["budget_use"] = values.pop("used")
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}

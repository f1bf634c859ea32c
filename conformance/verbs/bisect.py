"""`conformance bisect`: find the smallest set of operations or modules that makes a model break its gates."""

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.laws import LAWS
from conformance.models.culprits import Culprit
from conformance.models.situations import SITUATIONS
from conformance.models.task import ModelTask, quiet, trial_of
from conformance.reporting import results_file
from conformance.running.catalogue import UsageError, known
from conformance.tolerances.gates import Unchecked
from conformance.verbs import model
from conformance.verbs._shared import Verbs, add_verb

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial

Result = tuple[ModelTask, Culprit]  # with the law under which it was found


def add(verbs: Verbs) -> None:
    """Add the verb to the command line."""
    parser = add_verb(verbs, "bisect", "find the operations or modules that make a model break its gates")
    model.add_subject(parser)
    parser.add_argument(
        "--law",
        dest="laws",
        nargs="+",
        action="extend",
        metavar="L",
        help=f"as in a law: {', '.join(SITUATIONS)} (all)",
    )
    parser.add_argument("--only", nargs="+", action="extend", metavar="X", help="try this set alone, as a result names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.set_defaults(verb=_bisect, law=[*LAWS][:1], jobs=1)  # one task for each model and dtype


def _bisect(arguments: argparse.Namespace) -> int:
    tasks = model.tasks_asked(arguments)
    if len(tasks) != 1:
        raise UsageError(f"bisect: got {len(tasks)} of models and dtypes; allowed: one of each")
    (task,) = tasks
    laws = known("law", arguments.laws, list(SITUATIONS))
    print(model.heading(task), flush=True)
    with quiet():
        results = _searched(task, laws, arguments.only or [])
    lines = [f"{one}\nreproduce: {_again(one, of_law)}\n" for of_law, one in results]
    print("", *lines, sep="\n" if lines else "")
    print("" if lines else "nothing breaks: every call and the whole model stay within the budget")
    if arguments.json:
        _write(arguments.json, results, task)
    return 1 if lines else 0


def _searched(task: ModelTask, laws: Sequence[str], only: Sequence[str]) -> list[Result]:
    """Under each law the calls that break their own gates, and the smallest sets that break those of the model.

    Calls are compared where the model breaks a gate, or calls an operation that it did not call under the laws before.
    Operations that were found under a law are the reference's under the next ones. Modules end the search.
    """
    from conformance.models.building import NotBuilt

    trial = trial_of(task)
    results: list[Result] = []
    compared: frozenset[str] = frozenset()
    skipped: list[str] = []
    unknown: list[UsageError] = []
    for law in laws:
        wrong = dict.fromkeys(operation for _, one in results for operation in one.operations)
        backend = ",".join([task.backend, *(f"{operation}=reference" for operation in wrong)])
        of_law = replace(task, property=law, backend=backend)
        try:
            found, compared = _under_law(trial, of_law, compared, only)
        except UsageError as error:
            unknown.append(error)
            continue
        except (NotBuilt, Unchecked) as why:
            skipped.append(" ".join(str(why).split()))
            _say(law, f"says nothing: {skipped[-1]}")
            continue
        results += [(of_law, one) for one in found]
        if results and (only or not all(one.operations for one in found)):
            return results
    if unknown and len(unknown) + len(skipped) == len(laws):
        raise unknown[0]
    if len(skipped) == len(laws):
        raise UsageError(f"bisect: {skipped[0]}")
    return results


def _under_law(
    trial: "ModelTrial", task: ModelTask, compared: frozenset[str], only: Sequence[str]
) -> tuple[list[Culprit], frozenset[str]]:
    """What is found under the law of a task, and the operations whose calls were compared until now."""
    from conformance.models.bisecting import Bisection

    bisection = Bisection(trial, partial(_say, task.property), task.property, task.backend)
    calls: list[Culprit] = []
    if bisection.breaks() or bisection.operations - compared:
        compared |= bisection.operations
        calls = [Culprit.of_call(finding) for finding in bisection.calls()]
    if not only:
        try:
            return [*calls, *bisection.search()], compared
        except Unchecked:  # the untouched model breaks a gate too
            if calls:
                return [*calls], compared
            raise
    try:
        found = bisection.only(only)
    except KeyError as error:
        raise UsageError(f"--only: got {' '.join(only)}; allowed: {error.args[0]}, all of one kind") from error
    named = [one for one in calls for call in one.members if {call, *call.split("@", 1)} & {*only}]
    return [*named, *([] if found is None else [found])], compared


def _say(law: str, line: str) -> None:
    print(f"tried  {law}: {line}", flush=True)


def _again(one: Culprit, task: ModelTask) -> str:
    return f"python -m conformance bisect {shlex.join([*task.words(), '--only', *one.members])}"


def _write(path: Path, results: Sequence[Result], task: ModelTask) -> None:
    found = [_finite(one.as_dict()) | {"reproduce": _again(one, of_law)} for of_law, one in results]
    meta = model.meta_of(task) | {"model": task.op, "random": task.random, "dtype": task.dtype}
    results_file.write(path, meta, found)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}

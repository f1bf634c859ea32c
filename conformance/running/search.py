"""Checks one property of one operation or piece: draws cases, stops at the first failure and shrinks it."""

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from hypothesis import given, reject, seed, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy

from conformance.case import DTYPES, Case
from conformance.instruments.variants import launches
from conformance.piece import PieceCase, PieceTrial
from conformance.profiles import Profile, same_everywhere
from conformance.property import Property
from conformance.running.coverage import Explored, Reached, drawn_cases, explore, smaller
from conformance.spec import accepted_options
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Caught, Lacking, Refused, Trial, describe

# On a GPU a backend may record the first call with a signature and replay later ones, so one case in three is checked
# again, including the first one. The second check compiles nothing: a run takes at most a third longer.
REPEATED = 3
POOL = 100  # drawn cases whose sizes a smaller case may have; drawing them takes about 0.1 s

AnyCase = Case | PieceCase
AnyTrial = Trial | PieceTrial


@dataclass(frozen=True)
class Result:
    """The verdict on one property, operation and dtype.

    Attributes:
        dtype: the dtype's name; None for a piece.
        verdict: "pass", "fail" or "skip"; "xfail" for a failure that is declared (conformance.reporting.deviations).
        budget_use: largest fraction of the error budget used; None if the property has no budget.
        examples: number of cases run.
        case: the smallest failing case, in the form that `conformance repro` reads.
        message: the broken gate with the measured and the allowed value; or why the property was skipped.
        cut_short: whether the time for finding a smaller case ran out before the search for one ended.
        reached: the pairs of settings that its cases reached; None if there are none, or if they were not explored.
    """

    op: str
    property: str
    dtype: str | None
    verdict: Literal["pass", "fail", "skip", "xfail"]
    budget_use: float | None = None
    examples: int = 0
    case: str | None = None
    message: str | None = None
    cut_short: bool = False
    reached: Reached | None = None

    def as_dict(self) -> dict[str, Any]:
        """As written to JSON: the share of the pairs in place of `reached`."""
        share = None if self.reached is None else self.reached.share
        return {k: v for k, v in asdict(self).items() if k != "reached"} | {"coverage": share}


class _Attempts:
    """Checks cases one by one; remembers which failed, so that shrinking can end on time."""

    def __init__(
        self, trial: AnyTrial, prop: Property, dtype: str | None, seconds: float, notify: Callable[[str], None]
    ) -> None:
        self._trial, self._property, self._dtype, self.notify = trial, prop, dtype, notify
        self._shrink_seconds = seconds
        self._failed: dict[AnyCase, Failure] = {}
        self._lacking: dict[AnyCase, Failure] = {}  # cases with an option that the backend lacks
        self._deadline = float("inf")
        self._count = 0
        self._cut_short = False
        self._used: float | None = None
        self._unchecked = ""  # the reason why the last unchecked case was not checked

    def first(self, cases: Iterable[AnyCase], smaller: Callable[[Any], Iterable[AnyCase]]) -> Result | None:
        """Check these cases in turn; shrink the first one that fails. None if all pass."""
        result = self.over(cases)
        if result.verdict != "fail":
            return None
        return self._smallest(next(reversed(self._failed)), smaller)

    def _smallest(self, case: AnyCase, smaller: Callable[[Any], Iterable[AnyCase]]) -> Result:
        """The result of a case that failed, or of the smallest that is reached from it and fails too."""
        following: AnyCase | None = case if self._shrink_seconds else None
        while following is not None:
            case = following
            failing = (one for one in smaller(case) if self.over([one]).verdict == "fail" and one in self._failed)
            following = next(failing, None)
        return self._result(case, self._failed[case])

    def over(self, cases: Iterable[AnyCase]) -> Result:
        """Check these cases in turn; where the backend lacks a default, each with an option that it has."""
        for case in cases:
            for one in (case, *self._otherwise(case)):
                try:
                    self._attempt(one)
                except Failure as failure:
                    if one not in self._lacking:
                        return self._result(one, failure)
                if one not in self._lacking:
                    break
        return self._result()

    def _otherwise(self, case: AnyCase) -> Iterator[AnyCase]:
        """The case with each other value of each option; none of a property that checks these itself."""
        trial = self._trial
        if isinstance(case, Case) and isinstance(trial, Trial) and not (case.options or self._property.each_option):
            drawn = trial.spec.drawing.options.items()
            yield from (case.with_options({name: value}) for name, values in drawn for value in values[1:])

    def drawn(self, cases: SearchStrategy[Any], how: settings, smaller: Callable[[Any], Iterable[AnyCase]]) -> Result:
        """Check cases that Hypothesis draws and shrinks; it keeps to the kind of each draw, so `smaller` goes on."""
        last: list[AnyCase] = []
        # The same cases in every run, but different ones for every property, operation and dtype.
        name = f"{self._trial.spec.op} {self._property.name} {self._dtype}"
        stream = zlib.crc32(name.encode()) if how.derandomize else None

        @(lambda test: test if stream is None else seed(stream)(test))
        @how
        @given(cases)
        def attempt(case: AnyCase) -> None:
            last[:] = [case]
            try:
                self._attempt(case)
            except Failure:
                if case not in self._lacking:
                    raise
                if len(self._lacking) < 10 * how.max_examples:
                    reject()  # another one is drawn

        try:
            with same_everywhere():
                attempt()
        except Failure:
            return self._smallest(last[0], smaller)
        except Unsatisfiable:
            if not self._lacking:
                raise
        return self._result()

    def skipped(self, why: str) -> Result:
        """Nothing was checked."""
        return Result(self._trial.spec.op, self._property.name, self._dtype, "skip", message=why)

    def _result(self, case: AnyCase | None = None, failure: Failure | None = None) -> Result:
        who = self._trial.spec.op, self._property.name, self._dtype
        if failure is None and self._lacking and self._property.each_option:
            (case, failure), *others = self._lacking.items()
            names = [f"{name}={value}" for other, _ in others for name, value in getattr(other, "options", ())]
            text = f"{failure}\nrefused as well: {', '.join(names)}" if others else str(failure)
            return Result(*who, "fail", None, self._count, str(case), text)
        if failure is None and self._unchecked and not self._count:
            return Result(*who, "skip", message=self._unchecked)
        if failure is None:
            return Result(*who, "pass", self._used, self._count)
        return Result(*who, "fail", failure.used, self._count, str(case), str(failure), self._cut_short)

    def _attempt(self, case: AnyCase) -> None:
        if case not in self._failed and time.monotonic() > self._deadline:
            self._cut_short = True
            return  # time for shrinking is over: only cases known to fail still fail
        if (why := self._trial.refused(case)) is not None:
            self._unchecked = f"the reference refuses every case: {why}"
            return
        self._count += 1
        self.notify(str(case))
        try:
            failure = self._failed.get(case) or self._lacking.get(case) or self._check(case)
        except Unchecked as why:
            self._count -= 1
            self._unchecked = str(why)
            return
        if _follows(failure, Refused):
            self._count -= 1
            self._unchecked = str(failure)
            return
        if failure is not None and _follows(failure, Lacking):
            self._lacking[case] = failure
            if not self._property.each_option:
                self._count -= 1
                self._unchecked = f"the backend lacks an option of every case: {failure}"
            raise failure
        if failure is not None:
            if not self._failed:
                self._deadline = time.monotonic() + self._shrink_seconds
            self._failed[case] = failure
            raise failure

    def _check(self, case: AnyCase) -> Failure | None:
        """Check, on a GPU some cases twice: see REPEATED."""
        failure = self._check_once(case)
        if failure is None and self._trial.device == "cuda" and (self._failed or self._count % REPEATED == 1):
            failure = self._check_once(case)
            if failure is not None:
                return Failure(f"in a repeated call: {failure}", failure.used)
        return failure

    def _check_once(self, case: AnyCase) -> Failure | None:
        try:
            with Caught() as caught:
                used = self._property.check(self._trial, case)
                if used is not None:
                    self._used = max(used, self._used or 0.0)
                return None
        except Failure as failure:
            return failure
        return Failure(describe(caught.error))


def _follows(failure: BaseException | None, kind: type[Failure]) -> bool:
    """Whether a failure, or what caused it, is of a kind."""
    return failure is not None and (isinstance(failure, kind) or _follows(failure.__cause__, kind))


def search(
    trial: AnyTrial,
    prop: Property,
    profile: Profile,
    dtype: str | None,
    notify: Callable[[str], None] = lambda case: None,
    covering: Sequence[Case] | None = None,
) -> Result:
    """Search for a case in which a property does not hold.

    Args:
        trial: operation or piece, backend and device.
        prop: of the operation or piece.
        profile: the settings of the search.
        dtype: the dtype's name, for the result; None for a piece.
        notify: called with each case before it runs.
        covering: what `cover` returned, if it is known: an exploration takes seconds. Then the result does not say what
            was reached.
    """
    if why := prop.skipped(trial):
        return Result(trial.spec.op, prop.name, dtype, "skip", message=why)
    attempts = _Attempts(trial, prop, dtype, profile.shrink_seconds, notify)
    explored = None
    if covering is None:
        covering = cover(trial, prop, profile, notify)
        explored = explore(trial, profile, notify) if isinstance(trial, Trial) and profile.explored else None
    with launches() as seen:
        result = _checked(attempts, trial, prop, profile, covering)
    if explored is None or not explored.pairs:
        return result
    return replace(result, reached=explored.reached(seen.variants))


def cover(
    trial: AnyTrial, prop: Property, profile: Profile, notify: Callable[[str], None] = lambda case: None
) -> list[Case]:
    """The cases that a property checks before random ones: they cover what was explored; and the costly ones."""
    if prop.cases is not None or not isinstance(trial, Trial) or not profile.explored:
        return []
    # Each dtype takes every third case of one cover, so that together they cover three times as many settings.
    turn = list(DTYPES.values()).index(trial.dtype)
    whole = _whole(trial, profile, notify)
    found = whole.cover(len(DTYPES) * (3 * profile.count(prop.share) // 4), profile.examples // 5)[turn :: len(DTYPES)]
    return [*found, *(trial.spec.drawing.costly if prop.costly and profile.affords_costly else ())]


def _whole(trial: Trial, profile: Profile, notify: Callable[[str], None]) -> Explored:
    """The exploration in float32, or that in the trial's dtype if the former reached nothing."""
    whole = explore(replace(trial, dtype=torch.float32), profile, notify)
    return whole if whole.pairs else explore(trial, profile, notify)


def _checked(
    attempts: _Attempts, trial: AnyTrial, prop: Property, profile: Profile, covering: Sequence[Case]
) -> Result:
    """Check the property's own cases if it has any; else those that cover what was explored, then random ones."""
    if prop.cases is not None:
        cases = prop.cases(trial.spec, profile)
        return attempts.over(cases) if cases else attempts.skipped("no cases")
    failed = None
    if covering and isinstance(trial, Trial):
        failed = attempts.first(covering, lambda case: _whole(trial, profile, attempts.notify).smaller(case))
    count = max(1, profile.count(prop.share) - len(covering))
    return failed or attempts.drawn(trial.cases(profile), profile.settings(count), _simpler(trial, profile))


def _simpler(trial: AnyTrial, profile: Profile) -> Callable[[Any], Iterator[AnyCase]]:
    """What yields simpler cases of an operation, with sizes as a property draws them; none of a piece."""

    def simpler(case: Any) -> Iterator[AnyCase]:
        if isinstance(trial, Trial):
            options = tuple(accepted_options(trial.function, trial.spec))
            others = drawn_cases(trial.spec, profile.elements, options, POOL)
            yield from smaller(case, others, trial.spec.drawing.consistent)

    return simpler


def reproduce(trial: AnyTrial, prop: Property, case: AnyCase, dtype: str | None) -> Result:
    """Check one case."""
    if why := prop.skipped(trial):
        return Result(trial.spec.op, prop.name, dtype, "skip", message=why)
    return _Attempts(trial, prop, dtype, 0.0, lambda case: None).over([case])

"""Drives one law on one operation or piece: draws cases, stops at the first failure, shrinks it, reports."""

import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from hypothesis import given, seed, settings
from hypothesis.strategies import SearchStrategy

from conformance.case import Case
from conformance.gates import Failure
from conformance.piece import PieceCase, PieceProperty, PieceTrial
from conformance.profiles import Profile
from conformance.trial import Raised, Trial, describe

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

AnyCase = Case | PieceCase
AnyTrial = Trial | PieceTrial
AnyLaw = ModuleType | PieceProperty  # a module of `conformance.properties`, or a property of a piece


@dataclass(frozen=True)
class Result:
    """The verdict on one law, operation and dtype.

    Attributes:
        dtype: the dtype's name; None for a piece.
        verdict: "pass", "fail" or "skip".
        budget_use: largest share of the error budget used, 1.0 the whole; None where it has no meaning.
        examples: cases run.
        case: the minimal failing case, as `conformance repro` reads it.
        message: which gate it broke, measured and allowed; or why it was skipped.
    """

    op: str
    property: str
    dtype: str | None
    verdict: Literal["pass", "fail", "skip"]
    budget_use: float | None = None
    examples: int = 0
    case: str | None = None
    message: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As written to JSON."""
        return asdict(self)


class _Attempts:
    """Checks case after case; remembers what failed, so that shrinking can end on time."""

    def __init__(
        self, trial: AnyTrial, law: AnyLaw, dtype: str | None, shrink_seconds: float, notify: Callable[[str], None]
    ) -> None:
        self._trial, self._law, self._dtype, self._seconds, self._notify = trial, law, dtype, shrink_seconds, notify
        self._failed: dict[AnyCase, Failure] = {}
        self._deadline = float("inf")
        self._count = 0
        self._used: float | None = None

    def over(self, cases: Iterable[AnyCase]) -> Result:
        """Try these cases in turn."""
        for case in cases:
            try:
                self._attempt(case)
            except Failure as failure:
                return self._result(case, failure)
        return self._result()

    def drawn(self, cases: SearchStrategy[Any], how: settings) -> Result:
        """Let Hypothesis draw; the last case that fails is the smallest."""
        last: list[AnyCase] = []
        # The same cases every time, but other ones for every check.
        name = f"{self._trial.spec.op} {name_of(self._law)} {self._dtype}"
        stream = zlib.crc32(name.encode()) if how.derandomize else None

        @(lambda test: test if stream is None else seed(stream)(test))
        @how
        @given(cases)
        def attempt(case: AnyCase) -> None:
            last[:] = [case]
            self._attempt(case)

        try:
            attempt()
        except Failure as failure:
            return self._result(last[0], failure)
        return self._result()

    def _result(self, case: AnyCase | None = None, failure: Failure | None = None) -> Result:
        who = self._trial.spec.op, name_of(self._law), self._dtype
        if failure is None:
            return Result(*who, "pass", self._used, self._count)
        return Result(*who, "fail", failure.used, self._count, str(case), str(failure))

    def _attempt(self, case: AnyCase) -> None:
        if case not in self._failed and time.monotonic() > self._deadline:
            return  # shrinking has had its time: only what is known to fail goes on failing
        self._count += 1
        self._notify(str(case))
        failure = self._failed.get(case) or self._check(case)
        if failure is not None:
            if not self._failed:
                self._deadline = time.monotonic() + self._seconds
            self._failed[case] = failure
            raise failure

    def _check(self, case: AnyCase) -> Failure | None:
        try:
            with Raised() as raised:
                check: Callable[..., float | None] = self._law.check
                used = check(self._trial, case)
                if used is not None:
                    self._used = max(used, self._used or 0.0)
                return None
        except Failure as failure:
            return failure
        return Failure(describe(raised.error))


def name_of(law: AnyLaw) -> str:
    """The name of the property."""
    return law.name if isinstance(law, PieceProperty) else law.__name__.rsplit(".", 1)[-1]


def search(
    trial: AnyTrial,
    law: AnyLaw,
    profile: Profile,
    dtype: str | None,
    notify: Callable[[str], None] = lambda case: None,
) -> Result:
    """Look for a case in which a law does not hold.

    Args:
        trial: operation or piece, backend and device.
        law: a module of `conformance.properties`, or a law of the piece.
        profile: how long to look.
        dtype: the dtype's name, for the result; None for a piece.
        notify: told each case before it runs.
    """
    if getattr(law, "CUDA_ONLY", False) and trial.device != "cuda":
        return Result(trial.spec.op, name_of(law), dtype, "skip", message="needs CUDA")
    attempts = _Attempts(trial, law, dtype, profile.shrink_seconds, notify)
    cases = law.cases(trial.spec, profile) if hasattr(law, "cases") else None
    if cases is not None:
        no_cases = Result(trial.spec.op, name_of(law), dtype, "skip", message="no cases")
        return attempts.over(cases) if cases else no_cases
    return attempts.drawn(trial.cases(profile), profile.settings(getattr(law, "SHARE", 1.0)))


def replay(trial: AnyTrial, law: AnyLaw, case: AnyCase, dtype: str | None) -> Result:
    """Check one case."""
    if getattr(law, "CUDA_ONLY", False) and trial.device != "cuda":
        return Result(trial.spec.op, name_of(law), dtype, "skip", message="needs CUDA")
    return _Attempts(trial, law, dtype, 0.0, lambda case: None).over([case])

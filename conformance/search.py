"""Drives one law on one operation in one dtype: draws cases, stops at the first failure, shrinks it, reports."""

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
from conformance.profiles import Profile
from conformance.spec import accepted_options
from conformance.trial import Raised, Trial, describe

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """The verdict on one law, operation and dtype.

    Attributes:
        verdict: "pass", "fail" or "skip".
        budget_use: largest share of the error budget used, 1.0 the whole; None where it has no meaning.
        examples: cases run.
        case: the minimal failing case, as `conformance repro` reads it.
        message: which gate it broke, measured and allowed; or why it was skipped.
    """

    op: str
    property: str
    dtype: str
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

    def __init__(self, trial: Trial, law: ModuleType, shrink_seconds: float, notify: Callable[[str], None]) -> None:
        self._trial, self._law, self._seconds, self._notify = trial, law, shrink_seconds, notify
        self._failed: dict[Case, Failure] = {}
        self._deadline = float("inf")
        self._count = 0
        self._used: float | None = None

    def over(self, cases: Iterable[Case], dtype: str) -> Result:
        """Try these cases in turn."""
        for case in cases:
            try:
                self._attempt(case)
            except Failure as failure:
                return self._result(dtype, case, failure)
        return self._result(dtype)

    def drawn(self, cases: SearchStrategy[Case], how: settings, dtype: str) -> Result:
        """Let Hypothesis draw; the last case that fails is the smallest."""
        last: list[Case] = []
        # The same cases every time, but other ones for every check.
        stream = zlib.crc32(f"{self._trial.spec.op} {self._law.__name__} {dtype}".encode()) if how.derandomize else None

        @(lambda test: test if stream is None else seed(stream)(test))
        @how
        @given(cases)
        def attempt(case: Case) -> None:
            last[:] = [case]
            self._attempt(case)

        try:
            attempt()
        except Failure as failure:
            return self._result(dtype, last[0], failure)
        return self._result(dtype)

    def _result(self, dtype: str, case: Case | None = None, failure: Failure | None = None) -> Result:
        name = self._law.__name__.rsplit(".", 1)[-1]
        if failure is None:
            return Result(self._trial.spec.op, name, dtype, "pass", self._used, self._count)
        return Result(self._trial.spec.op, name, dtype, "fail", failure.used, self._count, str(case), str(failure))

    def _attempt(self, case: Case) -> None:
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

    def _check(self, case: Case) -> Failure | None:
        try:
            with Raised() as raised:
                used = self._law.check(self._trial, case)
                if used is not None:
                    self._used = max(used, self._used or 0.0)
                return None
        except Failure as failure:
            return failure
        return Failure(describe(raised.error))


def search(
    trial: Trial, law: ModuleType, profile: Profile, dtype: str, notify: Callable[[str], None] = lambda case: None
) -> Result:
    """Look for a case in which a law does not hold.

    Args:
        trial: operation, backend, dtype and device.
        law: a module of `conformance.properties`.
        profile: how long to look.
        dtype: the dtype's name, for the result.
        notify: told each case before it runs.
    """
    name = law.__name__.rsplit(".", 1)[-1]
    if getattr(law, "CUDA_ONLY", False) and trial.device != "cuda":
        return Result(trial.spec.op, name, dtype, "skip", message="needs CUDA")
    attempts = _Attempts(trial, law, profile.shrink_seconds, notify)
    if hasattr(law, "cases"):
        cases = law.cases(trial.spec, profile)
        return attempts.over(cases, dtype) if cases else Result(trial.spec.op, name, dtype, "skip", message="no cases")
    cases = trial.spec.cases(profile.elements, accepted_options(trial.function, trial.spec))
    return attempts.drawn(cases, profile.settings(getattr(law, "SHARE", 1.0)), dtype)


def replay(trial: Trial, law: ModuleType, case: Case, dtype: str) -> Result:
    """Check one case."""
    if getattr(law, "CUDA_ONLY", False) and trial.device != "cuda":
        return Result(trial.spec.op, law.__name__.rsplit(".", 1)[-1], dtype, "skip", message="needs CUDA")
    return _Attempts(trial, law, 0.0, lambda case: None).over([case], dtype)

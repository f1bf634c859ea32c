"""A mutant under the properties, in a process of its own: the first check that fails kills it.

The unchanged backend is examined in the same way. It shows which checks it passes, which of them run an expression, and
the bits of every result: a mutant that reaches the same bits in every call cannot be distinguished from the original.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from conformance import backends, operations
from conformance.case import DTYPES, Case
from conformance.mutate.mutant import Region
from conformance.mutate.reach import Reach
from conformance.mutate.sources import import_edited
from conformance.profiles import PROFILES, Profile
from conformance.properties import PROPERTIES
from conformance.running.runner import Task, alone
from conformance.running.search import Result, cover, search
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, Run, Trial, bits, describe

Check = tuple[str, str]  # property, dtype
Covers = tuple[tuple[Check, tuple[Case, ...]], ...]
# The properties that kill most mutants per second come first; those that are not named follow.
ORDER = (
    "one_at_a_time", "argument_kinds", "error_parity", "value", "guard_writes", "metadata", "guard_reads",
    "int64_offsets", "uninitialised", "signature_parity", "double_backward", "retained_backward", "calls_apart",
    "inputs_untouched", "no_grad", "autocast", "gradients", "extents", "special_values", "layouts", "row_independence",
)  # fmt: skip
QUICK = 3  # the first of them, in one dtype: most mutants get no further. Their cases need no exploration
CHEAP = 16  # a fifth of the time of all in one dtype


def stages(properties: Sequence[str], dtypes: Sequence[str]) -> list[list[Check]]:
    """Every property in every dtype, in the order in which a mutant is examined: most die in the first dtype."""
    ranks = {name: ORDER.index(name) if name in ORDER else len(ORDER) for name in properties}
    pairs = [(name, dtype) for name in properties for dtype in dtypes]
    ordered = sorted(pairs, key=lambda pair: (dtypes.index(pair[1]), ranks[pair[0]]))
    return [stage for stage in (ordered[:QUICK], ordered[QUICK:CHEAP], ordered[CHEAP:]) if stage]


def profile_of(name: str) -> Profile:
    """The profile, with the same cases in every run and no shrinking: a mutant's smallest case is not asked for."""
    return replace(PROFILES[name], derandomize=True, shrink_seconds=0.0)


@dataclass(frozen=True)
class Examined(Result):
    """The result of an examination, after its last check; `property` and `dtype` are those of the check that failed.

    Attributes:
        failed: every check that failed.
        raised: whether the plainest call raises, or the import of the backend.
        bits: a digest of all results of each check.
        ran: for each check, the numbers of the regions that it ran.
        covers: for each check, `search.cover`.
    """

    failed: tuple[Result, ...] = ()
    raised: bool = False
    bits: dict[Check, int] = field(default_factory=dict)
    ran: dict[Check, set[int]] = field(default_factory=dict)
    covers: Covers = ()


@dataclass(frozen=True)
class Examination(Task):
    """Run checks of one operation on a mutant, or on the unchanged backend.

    Attributes:
        mutant: its name; "" for the unchanged backend.
        edited: the module that is changed, and its text; None for the unchanged backend.
        checks: what to run, in this order.
        later: checks that another examination runs; for these too, say with which cases.
        covers: what an earlier examination of the unchanged backend said about cases.
        regions: pairs of a file's path and a place in it: which of them does each check run?
        every: go on after a failure.
    """

    mutant: str = ""
    edited: tuple[str, str] | None = None
    checks: tuple[Check, ...] = ()
    later: tuple[Check, ...] = ()
    covers: Covers = ()
    regions: tuple[tuple[str, Region], ...] = ()
    every: bool = False

    def __call__(self, notify: Callable[[str], None] = lambda case: None) -> Result:
        """Run in this process, which must not have imported the backend yet."""
        with Caught(SystemExit) as caught:
            if self.edited is not None:
                import_edited(*self.edited)
            function = backends.load(self.backend, self.device, self.source).functions[self.op]
            return self._examined(function, notify)
        failure = Result(self.op, "import", None, "fail", message=f"raised {describe(caught.error)}")
        return Examined(**vars(failure), failed=(failure,), raised=True)

    def _examined(self, function: Callable[..., Any], notify: Callable[[str], None]) -> Examined:
        failed, found, ran, examples = [], {}, {}, 0
        spec = operations.specs(self.source)[self.op]
        reach, covers, profile = Reach(self.regions), dict(self.covers), profile_of(self.profile)
        for check in (*self.checks, *self.later):
            name, dtype = check
            trial, prop = BitsTrial(spec, function, DTYPES[dtype], self.device), PROPERTIES[name]
            reach.forget()
            announce = lambda case, check=f"{name} {dtype}": notify(f"{check}: {case}")  # noqa: E731
            if check not in covers and not prop.skipped(trial):
                covers[check] = tuple(cover(trial, prop, profile, announce))
            if check in self.later:
                continue
            with (
                alone(name, lambda announce=announce: announce("waits for its turn")),
                reach.tracing() if self.regions else nullcontext(),
            ):
                result = search(trial, prop, profile, dtype, announce, covers.get(check, ()))
            examples += result.examples
            found[check], ran[check] = trial.digest(), set(reach.seen)
            if result.verdict == "fail":
                failed.append(result)
                if not self.every:
                    break
        first = failed[0] if failed else Result(self.op, "", None, "pass")
        raised = bool(failed) and (first.message or "").startswith(("raised", "backward raised"))
        return Examined(
            self.op, first.property, first.dtype, first.verdict, None, examples, first.case, first.message,
            failed=tuple(failed), raised=raised and self._raises(function), bits=found, ran=ran,
            covers=tuple(covers.items()),
        )  # fmt: skip

    def _raises(self, function: Callable[..., Any]) -> bool:
        """Whether the plainest call, forward and backward, raises."""
        spec = operations.specs(self.source)[self.op]
        try:
            Trial(spec, function, torch.float32, self.device).run(spec.case(5, 130))
        except Failure:
            return True
        return False


@dataclass(frozen=True)
class BitsTrial(Trial):
    """A trial that also adds up the bits of all results of the judged function.

    Attributes:
        digests: one number for each tensor, on its device: reading them at once would wait for the device.
    """

    digests: list[Tensor] = field(default_factory=list)

    def run(self, case: Case, *arguments: Any, **keywords: Any) -> Run:
        """As Trial.run; also records the bits of the results."""
        run = super().run(case, *arguments, **keywords)
        if keywords.get("function") is None:
            self.digests.extend(_digest(tensor) for _, _, tensor in run.named(self.spec))
        return run

    def digest(self) -> int:
        """One number for all results so far."""
        total = 0
        for number in self.digests:
            total = (total * 1_000_003 + int(number)) % 2**61
        return total


def _digest(tensor: Tensor) -> Tensor:
    """A number that depends on every bit and place; integers wrap around."""
    flat = bits(tensor).flatten().long()
    places = torch.arange(1, len(flat) + 1, device=flat.device)
    return ((flat + 0x9E3779B9) * (places * 2_654_435_761 + 1)).sum()

"""No result depends on what `torch.empty` held: the bits are the same over NaN and over a large number."""

from conformance.case import Case
from conformance.memory import Allocations
from conformance.trial import Trial, demand_same_bits

SHARE = 0.4


def check(trial: Trial, case: Case) -> None:
    """Run with memory full of NaN, run with memory full of 1e4."""
    with Allocations():
        first = trial.run(case)
    with Allocations(fill=1e4):
        second = trial.run(case)
    demand_same_bits(trial.spec, first, second, "uninitialised memory shows in the results")

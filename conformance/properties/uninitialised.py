"""Results do not depend on uninitialised memory: filling it with NaN or with 1e4 gives the same bits."""

from conformance.case import Case
from conformance.memory import Allocations
from conformance.property import Property
from conformance.trial import Trial, demand_same_bits


def check(trial: Trial, case: Case) -> None:
    """Compare a run whose uninitialised memory holds NaN with a run where it holds 1e4."""
    with Allocations():
        first = trial.run(case)
    with Allocations(fill=1e4):
        second = trial.run(case)
    demand_same_bits(trial.spec, first, second, "uninitialised memory changes the results")


PROPERTY = Property.of_file(check, share=0.4)

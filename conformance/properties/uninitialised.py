"""Results do not depend on uninitialised memory: they have the same bits whatever it holds, floats or integers."""

from conformance.case import Case
from conformance.memory import POISONS, fenced
from conformance.property import Property
from conformance.trial import Run, Trial, demand_same_bits


def check(trial: Trial, case: Case) -> None:
    """Compare runs in which uninitialised memory holds different bytes."""

    def filled(poison: int) -> Run:
        with fenced(trial.device, poison):
            return trial.run(case)

    first = filled(POISONS[0])
    for poison in POISONS[1:]:
        demand_same_bits(trial.spec, first, filled(poison), "uninitialised memory changes the results")


PROPERTY = Property.of_file(check, share=0.4)

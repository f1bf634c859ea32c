"""Results do not depend on uninitialised memory: they have the same bits whatever it holds, floats or integers."""

from conformance.case import Case
from conformance.instruments.memory import POISONS, demand_unaffected, fenced
from conformance.property import Property, of_file
from conformance.trial import Run, Trial


def check(trial: Trial, case: Case) -> None:
    """Compare runs in which uninitialised memory holds different bytes."""

    def filled(poison: int) -> Run:
        with fenced(trial.device, poison):
            return trial.run(case)

    demand_unaffected(trial, case, filled, POISONS, "uninitialised memory changes the results")


PROPERTY = Property(*of_file(check), share=0.4)

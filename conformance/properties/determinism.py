"""Repeated calls on the same inputs give the same bits."""

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.trial import Trial, demand_same_bits


def check(trial: Trial, case: Case) -> None:
    """Compare three runs on fresh copies of the same inputs."""
    first = trial.run(case)
    for _ in range(2):
        demand_same_bits(trial.spec, first, trial.run(case), "two runs on the same input differ")


PROPERTY = Property(*of_file(check), share=0.4)

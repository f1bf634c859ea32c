"""Outputs are within the error budget around the float64 reference."""

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.trial import Trial


def check(trial: Trial, case: Case) -> float:
    """Judge the forward pass."""
    return trial.judge(case, trial.run(case, grads=()))


PROPERTY = Property(*of_file(check))

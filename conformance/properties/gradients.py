"""Gradients are within the error budget for every subset of inputs: freezing one input does not change the others."""

from itertools import combinations

from conformance.case import Case
from conformance.property import Property
from conformance.trial import Trial


def check(trial: Trial, case: Case) -> float:
    """Judge every subset of the differentiable inputs, starting with all of them."""
    inputs = trial.inputs(case)
    names = [name for name in trial.spec.grads if name in inputs]
    subsets = [subset for count in range(len(names), 0, -1) for subset in combinations(names, count)]
    return max(trial.judge(case, trial.run(case, inputs, grads=subset), inputs) for subset in subsets)


PROPERTY = Property.of_file(check, needs=("gradients",))

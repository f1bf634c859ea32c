"""The gradients are right, of all inputs together and of every subset: freezing one input must not touch another's."""

from itertools import combinations

from conformance.case import Case
from conformance.trial import Trial


def check(trial: Trial, case: Case) -> float:
    """Every subset of the inputs that can get a gradient, all of them first."""
    inputs = trial.inputs(case)
    names = [name for name in trial.spec.grads if name in inputs]
    subsets = [subset for count in range(len(names), 0, -1) for subset in combinations(names, count)]
    return max(trial.judge(case, trial.run(case, inputs, grads=subset), inputs) for subset in subsets)

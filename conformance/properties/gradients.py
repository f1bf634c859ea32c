"""Gradients are within the error budget for every subset of inputs: freezing one input does not change the others.

Of lists of inputs, whose subsets are too many, these are judged: whole lists, each element alone, all without one.
They are so too where a loss uses one of several outputs alone: autograd then has no gradient of the others.
"""

from collections.abc import Sequence
from itertools import chain, combinations, groupby
from typing import Any

import torch

from conformance.calling import results
from conformance.case import Case
from conformance.properties.layouts import naming
from conformance.property import Property, of_file
from conformance.spec import Inputs
from conformance.trial import Trial, as_leaves


def check(trial: Trial, case: Case) -> float:
    """Judge every subset of the differentiable inputs, starting with all of them; then each output alone."""
    inputs = trial.inputs(case)
    names = [name for name in trial.spec.grads if name in inputs]
    used = max(trial.judge(case, trial.run(case, inputs, grads=subset), inputs) for subset in _subsets(names))
    if len(trial.spec.outputs) > 1 and not trial.spec.in_place:
        used = max(used, *(_alone(trial, case, inputs, names, index) for index in range(len(trial.spec.outputs))))
    return used


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Subsets of names, the whole first; elements of a list have names such as `xs[0]`."""
    lists = [tuple(group) for _, group in groupby(names, lambda name: name.partition("[")[0])]
    chosen = [subset for count in range(len(lists), 0, -1) for subset in combinations(lists, count)]
    elements = [name for one in lists if len(one) > 1 for name in one]
    return [
        *(tuple(chain(*subset)) for subset in chosen),
        *((name,) for name in elements),
        *(tuple(other for other in names if other != name) for name in elements),
    ]


def _alone(trial: Trial, case: Case, inputs: Inputs, names: Sequence[str], index: int) -> float:
    """Judge the gradients of one output, of those inputs on which it depends."""
    leaves = as_leaves(inputs, names)
    outputs = trial.call(leaves, trial.options(case), trial.spec.reference)
    if not outputs[index].requires_grad:
        return 0.0
    found = torch.autograd.grad(outputs[index].sum(), [leaves[name] for name in names], allow_unused=True)
    reached = [name for name, gradient in zip(names, found, strict=True) if gradient is not None]
    grad_outputs = [g if i == index else torch.zeros_like(g) for i, g in enumerate(trial.grad_outputs(case, outputs))]

    def one(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        every = results(trial.function(*arguments, **options), ())
        return tuple(output if i == index else output.detach() for i, output in enumerate(every))

    with naming(f"output {trial.spec.outputs[index]} alone"):
        run = trial.run(case, inputs, function=one, grads=reached, grad_outputs=grad_outputs)
        return trial.judge(case, run, inputs, grad_outputs)


PROPERTY = Property(*of_file(check), needs=("gradients",))

"""Differentiating twice gives the correct second derivative or raises RuntimeError, and never gives a wrong value.

Always checked in float32: the purpose is to find a missing term, which rounding to 16 bits would hide.
"""

from dataclasses import replace

import torch
from torch import Tensor

from conformance.case import Case
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Spec
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, Function, Trial, as_leaves, describe
from unsloth_ref.accuracy import widen

TOLERANCE = 0.05  # of the largest entry that the squares add: separates a missing term from rounding
ROUNDING = 1e-3  # of the largest entry of the sum of both: thousands of roundings of float32


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Few elements, so that second derivatives are not small beside the first; then each option value by itself."""
    case = spec.case(2, 5)
    return [case, *(case.with_options({name: v}) for name, values in spec.drawing.options.items() for v in values[1:])]


def check(trial: Trial, case: Case) -> None:
    """Differentiate the outputs plus the squares of their gradients with respect to every differentiable input.

    The incoming gradients are constants first, different ones: where all are equal, the gradient of a softmax is 0.
    Then they are the outputs, and depend on the inputs too: a backward pass that cuts them off loses a term, even if
    the operation is linear.
    """
    trial = replace(trial, dtype=torch.float32)
    for constant in (True, False):
        _check(trial, case, constant)


def _check(trial: Trial, case: Case, constant: bool) -> None:
    with Caught() as caught:
        seen = _second_derivatives(trial, case, trial.function, constant, wide=False)
        right = _second_derivatives(trial, case, trial.spec.reference, constant, wide=True)
        added = _second_derivatives(trial, case, trial.spec.reference, constant, wide=True, outputs_too=False)
        for name, y in seen.items():
            r = right[name]
            error = (y.double() - r).abs().max() if r.numel() else r.sum()
            allowed = TOLERANCE * _largest(added[name]) + ROUNDING * _largest(r)
            if not error <= min(allowed, TOLERANCE * _largest(r)):
                raise Failure(
                    f"the second derivative with respect to {name} is wrong: error {float(error):.2g},"
                    f" largest entry {_largest(r):.2g}; an operation that has none must raise RuntimeError,"
                    " also where no incoming gradient requires one, as torch's once_differentiable does not"
                )
    if caught.error is not None and not isinstance(caught.error, RuntimeError):  # NotImplementedError is one
        raise Failure(f"differentiating twice raised {describe(caught.error)}, should raise RuntimeError")


def _largest(derivative: Tensor) -> float:
    return max(float(derivative.abs().max()), 1e-3) if derivative.numel() else 1e-3


def _second_derivatives(
    trial: Trial, case: Case, function: Function, constant: bool, wide: bool, outputs_too: bool = True
) -> dict[str, Tensor]:
    inputs = {n: widen(t) if wide else t for n, t in trial.inputs(case).items()}
    inputs = as_leaves(inputs, trial.spec.grads)
    leaves = {name: inputs[name] for name in trial.spec.grads if name in inputs}
    outputs = [output for output in trial.call(inputs, trial.options(case), function) if output.requires_grad]
    incoming = [torch.linspace(0.5, 1.5, o.numel()).to(o).view_as(o) for o in outputs] if constant else outputs
    grads = torch.autograd.grad(outputs, [*leaves.values()], incoming, create_graph=True)
    # Like a gradient penalty added to the loss: autograd does not notice gradients that are cut off from the graph.
    terms = [o.double().sum() for o in outputs if outputs_too] + [g.double().square().sum() for g in grads]
    total = torch.stack(terms).sum()
    if outputs_too or total.requires_grad:  # linear operations have no second derivative
        total.backward()  # not `grad` of the leaves, which runs no node that leads elsewhere, such as one that raises
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


PROPERTY = Property(*of_file(check), cases=cases, needs=("gradients",))

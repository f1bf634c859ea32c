"""Calls do not meet: one between a forward pass and its backward pass, or after both, changes no bit of either.

A model calls an operation in every layer before it goes back through any of them.
"""

from dataclasses import replace

from conformance.case import Case
from conformance.trial import Run, Trial, demand_same_bits, detached, leaf

SHARE = 0.2


def check(trial: Trial, case: Case) -> None:
    """The same sizes with other elements, in between and afterwards."""
    plain = trial.run(case)
    plain = Run(tuple(y.clone() for y in plain.outputs), {name: g.clone() for name, g in plain.grads.items()})
    inputs = {name: leaf(tensor, name in trial.spec.grads) for name, tensor in trial.inputs(case).items()}
    outputs = trial.call(inputs, trial.options(case))
    kept = trial.run(replace(case, seed=case.seed + 1))
    grads = trial.backward(outputs, inputs, trial.spec.grads, trial.grad_outputs(case, outputs))
    trial.run(replace(case, seed=case.seed + 2))
    demand_same_bits(trial.spec, plain, Run(detached(outputs), grads), "another call in between changes the results")
    del kept  # alive until here, as the activations of a model are

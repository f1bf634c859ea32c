"""Calls are independent: another call between or after the forward and backward passes changes no bit of the results.

A model runs the forward pass of every layer before the backward pass of any.
"""

from dataclasses import replace

from conformance.case import Case
from conformance.property import Property
from conformance.trial import Run, Trial, as_leaves, demand_same_bits, detached


def check(trial: Trial, case: Case) -> None:
    """Call with the same sizes and other elements, between the two passes and after them."""
    alone = trial.run(case)
    alone = Run(tuple(y.clone() for y in alone.outputs), {name: g.clone() for name, g in alone.grads.items()})
    inputs = as_leaves(trial.inputs(case), trial.spec.grads)
    outputs = trial.call(inputs, trial.options(case))
    other = trial.run(replace(case, seed=case.seed + 1))
    grads = trial.backward(outputs, inputs, trial.spec.grads, trial.grad_outputs(case, outputs))
    trial.run(replace(case, seed=case.seed + 2))
    demand_same_bits(trial.spec, alone, Run(detached(outputs), grads), "another call in between changes the results")
    del other  # kept alive until here, as a model keeps its activations


PROPERTY = Property.of_file(check, share=0.2)

"""No memory outside a tensor is read: results have the same bits whatever surrounds inputs and allocations."""

from conformance.case import Case
from conformance.memory import POISONS, Fence, demand_unaffected, fenced
from conformance.property import Property
from conformance.trial import Run, Trial


def check(trial: Trial, case: Case) -> None:
    """Compare runs in which the bands around inputs and allocations hold different bytes."""
    inputs = trial.inputs(case)
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs)

    def between(band: int) -> Run:
        around = {name: Fence(tensor, band).tensor for name, tensor in inputs.items()}
        gradients = [Fence(gradient, band).tensor for gradient in grad_outputs]
        with fenced(trial.device, band=band):
            return trial.run(case, around, grad_outputs=gradients)

    demand_unaffected(trial, case, between, POISONS, "the memory around the tensors changes the results")


PROPERTY = Property.of_file(check, share=0.4)

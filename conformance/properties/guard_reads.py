"""No memory outside a tensor is read: results have the same bits whatever surrounds inputs and allocations.

Triton's interpreter also shows the addresses: there a load from outside fails whatever becomes of the element. On a GPU
it may end the process, where the page behind a tensor is not mapped.
"""

import sys

from conformance.case import Case
from conformance.instruments.memory import POISONS, Fence, demand_unaffected, fenced
from conformance.interpreter import reads
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
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

    if trial.device == "cpu" and "triton" in sys.modules:
        with reads() as seen:
            trial.run(case, inputs, grad_outputs=grad_outputs)
        if seen.outside:
            raise Failure(seen.outside)
    demand_unaffected(trial, case, between, POISONS, "the memory around the tensors changes the results")


PROPERTY = Property(*of_file(check), share=0.4)

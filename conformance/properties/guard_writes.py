"""No memory outside a tensor is written: canaries around every input and allocation are unchanged after both passes."""

from conformance.case import Case
from conformance.memory import Allocations, Fence, demand_unbroken
from conformance.property import Property
from conformance.trial import Trial

BAND = 3.0  # around inputs; differs from the NaN around allocations, so that copying one element too many is found


def check(trial: Trial, case: Case) -> None:
    """Fence every input and allocation, run both passes, inspect the fences."""
    fences = {name: Fence(tensor, BAND) for name, tensor in trial.inputs(case).items()}
    inputs = {name: fence.tensor for name, fence in fences.items()}
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs)
    grad_fences = [Fence(gradient, BAND) for gradient in grad_outputs]
    with Allocations() as allocations:
        trial.run(case, inputs, grad_outputs=[fence.tensor for fence in grad_fences])
    allocations.demand_unbroken()
    for name, fence in [*fences.items(), *(("grad_output", fence) for fence in grad_fences)]:
        demand_unbroken(name, fence)


PROPERTY = Property.of_file(check, share=0.4)

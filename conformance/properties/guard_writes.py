"""No memory outside a tensor is written: bands around every input and allocation are unchanged after both passes."""

from conformance.case import Case
from conformance.instruments.memory import Fence, demand_unbroken, fenced
from conformance.property import Property, of_file
from conformance.trial import Trial


def check(trial: Trial, case: Case) -> None:
    """Fence every input and allocation, run both passes, inspect the bands."""
    fences = {name: Fence(tensor) for name, tensor in trial.inputs(case).items()}
    inputs = {name: fence.tensor for name, fence in fences.items()}
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs)
    grad_fences = [Fence(gradient) for gradient in grad_outputs]
    with fenced(trial.device) as allocations:
        trial.run(case, inputs, grad_outputs=[fence.tensor for fence in grad_fences])
    allocations.demand_unbroken()
    for name, fence in [*fences.items(), *(("grad_output", fence) for fence in grad_fences)]:
        demand_unbroken(name, fence)


PROPERTY = Property(*of_file(check), share=0.4, costly=True)

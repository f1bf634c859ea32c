"""Nothing is written outside: canaries on both sides of every input and every allocation survive both passes."""

from conformance.case import Case
from conformance.memory import Allocations, Fence, demand_unbroken
from conformance.trial import Trial

SHARE = 0.4
BAND = 3.0  # around inputs, unlike the NaN around allocations: copied one element too far, it shows


def check(trial: Trial, case: Case) -> None:
    """Fence everything, run, look at the fences."""
    fences = {name: Fence(tensor, BAND) for name, tensor in trial.inputs(case).items()}
    inputs = {name: fence.tensor for name, fence in fences.items()}
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs)
    grad_fences = [Fence(gradient, BAND) for gradient in grad_outputs]
    with Allocations() as allocations:
        trial.run(case, inputs, grad_outputs=[fence.tensor for fence in grad_fences])
    allocations.demand_unbroken()
    for name, fence in [*fences.items(), *(("grad_output", fence) for fence in grad_fences)]:
        demand_unbroken(name, fence)

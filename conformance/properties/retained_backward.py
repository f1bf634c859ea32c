"""A second backward pass through a retained graph gives the same bits as the first."""

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.trial import Run, Trial, as_leaves, demand_same_bits, detached


def check(trial: Trial, case: Case) -> None:
    """Compare two backward passes of one forward pass."""
    names = trial.spec.grads
    inputs = as_leaves(trial.inputs(case), names)
    outputs = trial.call(inputs, trial.options(case))
    grad_outputs = trial.grad_outputs(case, outputs)
    first = trial.backward(outputs, inputs, names, grad_outputs, keep=True)
    first = {name: gradient.clone() for name, gradient in first.items()}
    second = trial.backward(outputs, inputs, names, grad_outputs)
    demand_same_bits(
        trial.spec, Run(detached(outputs), first), Run(detached(outputs), second), "a second backward pass differs"
    )


PROPERTY = Property(*of_file(check), share=0.4, needs=("gradients",))

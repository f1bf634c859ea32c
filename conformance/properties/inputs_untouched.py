"""Neither pass modifies the inputs, the outputs or the gradients of the outputs."""

from torch import Tensor

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Trial, as_leaves, bits


def check(trial: Trial, case: Case) -> None:
    """Compare bits and version counters before and after each pass."""
    inputs = as_leaves(trial.inputs(case), trial.spec.grads)
    before = {name: (bits(tensor).clone(), tensor._version) for name, tensor in inputs.items()}
    outputs = trial.call(inputs, trial.options(case))
    _demand_untouched(inputs, before, "the forward pass")
    grad_outputs = trial.grad_outputs(case, outputs)
    named = {f"grad_output of {name}": g for name, g in zip(trial.spec.outputs, grad_outputs, strict=False)}
    named |= {f"output {name}": output for name, output in zip(trial.spec.outputs, outputs, strict=False)}
    before |= {name: (bits(tensor).clone(), tensor._version) for name, tensor in named.items()}
    trial.backward(outputs, inputs, trial.spec.grads, grad_outputs)
    _demand_untouched(inputs | named, before, "the backward pass")


def _demand_untouched(tensors: dict[str, Tensor], before: dict[str, tuple[Tensor, int]], when: str) -> None:
    for name, tensor in tensors.items():
        old, version = before[name]
        if tensor._version != version or not old.equal(bits(tensor)):
            raise Failure(f"{when} wrote over {name}")


PROPERTY = Property(*of_file(check), share=0.5)

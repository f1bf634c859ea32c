"""Tensors that span more than 2^31 elements give correct results.

In each dimension but the last in turn, the last index is 2^31 elements after the first: nine gigabytes of address
space, of which only the elements are touched. Half a million tokens of 4096 elements are as many. A call that plain
PyTorch refuses, because a library counts a stride in 32 bits, is not made.
"""

import torch
from torch import Tensor

from conformance.case import Case
from conformance.gates import Failure
from conformance.profiles import Profile
from conformance.properties.layouts import naming
from conformance.property import Property
from conformance.spec import Inputs, Spec
from conformance.trial import Trial

FAR = 2**31


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Two rows of about one tile each; then several heads, where there are heads."""
    return [spec.case(2, 130), spec.case(3, 15)]


def check(trial: Trial, case: Case) -> float:
    """Spread each input that may be so large, then the gradient of each output that has rows."""
    used = 0.0
    for name in trial.spec.far or trial.spec.rowwise:
        inputs = trial.inputs(case)
        for dimension in _dimensions(inputs[name]) if inputs[name].is_floating_point() else ():
            with naming(f"{name} spread in dimension {dimension}"):
                spread = {**inputs, name: _spread(inputs[name], dimension)}
                if not _refused(trial, case, spread):
                    used = max(used, trial.judge(case, trial.run(case, spread), inputs))
    case = trial.rowwise(case)
    outputs = trial.run(case, function=trial.spec.reference, grads=()).outputs
    for index, name in enumerate(trial.spec.outputs):
        for dimension in _dimensions(outputs[index]):
            grad_outputs = trial.grad_outputs(case, outputs)
            with naming(f"grad_output of {name} spread in dimension {dimension}"):
                far = [_spread(g, dimension) if g is grad_outputs[index] else g for g in grad_outputs]
                if not _refused(trial, case, None, far):
                    used = max(used, trial.judge(case, trial.run(case, grad_outputs=far), grad_outputs=grad_outputs))
    return used


def _refused(trial: Trial, case: Case, inputs: Inputs | None, grad_outputs: list[Tensor] | None = None) -> bool:
    try:
        trial.run(case, inputs, function=trial.spec.reference, grad_outputs=grad_outputs)
    except Failure:
        return True
    return False


def _dimensions(tensor: Tensor) -> list[int]:
    """Those whose stride can be large: all but the last of a tensor of several, if they have two indices."""
    return [d for d in range(max(min(tensor.ndim, 1), tensor.ndim - 1)) if tensor.shape[d] > 1]


def _spread(tensor: Tensor, dimension: int) -> Tensor:
    """The same elements, with the last index of a dimension FAR elements after the first."""
    stride = -(-FAR // (tensor.shape[dimension] - 1))
    inner = tensor.transpose(0, dimension)[0].numel()
    buffer = torch.empty((tensor.shape[dimension] - 1) * stride + inner, dtype=tensor.dtype, device=tensor.device)
    others = [size for d, size in enumerate(tensor.shape) if d != dimension]
    strides = list(torch.empty(others, device="meta").stride())
    far = buffer.as_strided(tensor.shape, (*strides[:dimension], stride, *strides[dimension:]))
    if not far.copy_(tensor).equal(tensor):
        raise Failure("this machine cannot allocate nine gigabytes of address space")
    return far


def _exempt(spec: Spec) -> str:
    return "" if spec.far or spec.rowwise else "no input is declared to have independent rows"


PROPERTY = Property.of_file(check, cases=cases, needs=("gigabytes",), exempt=_exempt)

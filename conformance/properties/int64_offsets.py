"""Tensors that span more than 2^31 elements give correct results.

The last row starts 2^31 elements after the first: nine gigabytes of address space, of which only the rows are touched.
"""

import torch
from torch import Tensor

from conformance.case import Case
from conformance.gates import Failure
from conformance.profiles import Profile
from conformance.properties.layouts import naming
from conformance.property import Property
from conformance.spec import Spec
from conformance.trial import Trial

FAR = 2**31


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Two rows of about one tile each."""
    return [spec.case(2, 130)]


def check(trial: Trial, case: Case) -> float:
    """Spread each row-wise input in turn, then the gradient of each output that has rows."""
    used = 0.0
    for name in trial.spec.rowwise:
        inputs = trial.inputs(case)
        if inputs[name].is_floating_point():
            with naming(f"{name} spread"):
                used = max(used, trial.judge(case, trial.run(case, {**inputs, name: _spread(inputs[name])}), inputs))
    case = trial.rowwise(case)
    outputs = trial.run(case, function=trial.spec.reference, grads=()).outputs
    for index, name in enumerate(trial.spec.outputs):
        if outputs[index].ndim:
            grad_outputs = trial.grad_outputs(case, outputs)
            with naming(f"grad_output of {name} spread"):
                run = trial.run(
                    case, grad_outputs=[_spread(g) if g is grad_outputs[index] else g for g in grad_outputs]
                )
                used = max(used, trial.judge(case, run, grad_outputs=grad_outputs))
    return used


def _spread(rows: Tensor) -> Tensor:
    """The same rows, with the last one FAR elements after the first."""
    gaps = max(1, len(rows) - 1)
    stride = -(-FAR // gaps)
    buffer = torch.empty(gaps * stride + rows[0].numel(), dtype=rows.dtype, device=rows.device)
    far = buffer.as_strided(rows.shape, (stride, *rows.stride()[1:]))
    if not far.copy_(rows)[-1].equal(rows[-1]):
        raise Failure("this machine cannot allocate nine gigabytes of address space")
    return far


PROPERTY = Property.of_file(check, cases=cases, needs=("gigabytes", "rows"))

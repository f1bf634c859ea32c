"""Offsets past 2^31 elements are right.

The last row begins 2^31 elements behind the first: nine gigabytes of addresses, of which only rows are ever touched.
"""

import torch
from torch import Tensor

from conformance.case import Case
from conformance.gates import Failure
from conformance.profiles import Profile
from conformance.properties.layouts import naming
from conformance.spec import Spec
from conformance.trial import Trial

LARGE = True
FAR = 2**31


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Two rows of one tile."""
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
    """The same rows, the last one FAR from the first."""
    gaps = max(1, len(rows) - 1)
    stride = -(-FAR // gaps)
    buffer = torch.empty(gaps * stride + rows[0].numel(), dtype=rows.dtype, device=rows.device)
    far = buffer.as_strided(rows.shape, (stride, *rows.stride()[1:]))
    if not far.copy_(rows)[-1].equal(rows[-1]):
        raise Failure("this machine does not hold nine gigabytes of addresses")
    return far

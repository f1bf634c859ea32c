"""Under autocast the results are right for the inputs given: an operation that works in float32 loses nothing to it."""

import torch

from conformance.case import Case
from conformance.trial import Run, Trial, detached, leaf

SHARE = 0.3


def check(trial: Trial, case: Case) -> float:
    """Forward under autocast to bfloat16, backward outside, as training does."""
    inputs = {name: leaf(tensor, name in trial.spec.grads) for name, tensor in trial.inputs(case).items()}
    with torch.autocast(trial.device, torch.bfloat16):
        outputs = trial.call(inputs, trial.options(case))
    grads = trial.backward(outputs, inputs, trial.spec.grads, trial.grad_outputs(case, outputs))
    return trial.judge(case, Run(detached(outputs), grads))

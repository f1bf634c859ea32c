"""Under `no_grad` and `inference_mode` results are as right as in training, and nothing is recorded."""

import torch

from conformance.case import Case
from conformance.gates import Failure
from conformance.trial import Run, Trial, leaf

SHARE = 0.3


def check(trial: Trial, case: Case) -> float:
    """Same inputs, all requiring gradients."""
    inputs = {name: leaf(tensor, name in trial.spec.grads) for name, tensor in trial.inputs(case).items()}
    used = 0.0
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs = trial.call(inputs, trial.options(case))
        if any(output.requires_grad for output in outputs):
            raise Failure(f"an output requires a gradient under {type(context).__name__}")
        used = max(used, trial.judge(case, Run(outputs, {})))
    return used

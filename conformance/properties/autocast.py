"""Autocast does not reduce accuracy: results under it are within the error budget of the given inputs."""

import torch

from conformance.case import Case
from conformance.interpreter import Interpreted
from conformance.property import Property, of_file
from conformance.trial import Run, Trial, as_leaves, detached


def check(trial: Trial, case: Case) -> float:
    """Run the forward pass under autocast and the backward pass outside it, as training does.

    Autocast to float16 for inputs in float16, otherwise to bfloat16: of tensors in the other one torch stacks none.
    """
    narrow = torch.float16 if trial.dtype == torch.float16 else torch.bfloat16
    inputs = as_leaves(trial.inputs(case), trial.spec.grads)
    with torch.autocast(trial.device, narrow), Interpreted() as forward:
        outputs = trial.call(inputs, trial.options(case))
    with Interpreted() as backward:
        grads = trial.backward(outputs, inputs, trial.spec.grads, trial.grad_outputs(case, outputs))
    return trial.judge(case, Run(detached(outputs), grads, bool(forward), bool(backward)))


PROPERTY = Property(*of_file(check), share=0.3)

"""Under `no_grad` and `inference_mode` the bits are those of training, and nothing is recorded."""

import torch

from conformance.case import Case
from conformance.gates import Failure
from conformance.trial import Run, Trial, demand_same_bits, detached, leaf

SHARE = 0.3


def check(trial: Trial, case: Case) -> None:
    """Same inputs, all requiring gradients."""
    inputs = {name: leaf(tensor, name in trial.spec.grads) for name, tensor in trial.inputs(case).items()}
    trained = trial.call(inputs, trial.options(case))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs = trial.call(inputs, trial.options(case))
            if any(output.requires_grad for output in outputs):
                raise Failure(f"an output requires a gradient under {type(context).__name__}")
            law = f"{type(context).__name__} changes the results"
            demand_same_bits(trial.spec, Run(detached(trained), {}), Run(outputs, {}), law)

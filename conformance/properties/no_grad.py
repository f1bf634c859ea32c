"""`no_grad` and `inference_mode` give correct results with the bits of training, and record no graph."""

import torch

from conformance.case import Case
from conformance.interpreter import Interpreted
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, as_leaves, demand_same_bits, detached


def check(trial: Trial, case: Case) -> float:
    """Use the same inputs in every mode, with gradients required."""
    inputs = as_leaves(trial.inputs(case), trial.spec.grads)
    trained, used = Run(detached(trial.call(inputs, trial.options(case))), {}), 0.0
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Interpreted() as forward:
            outputs = trial.call(inputs, trial.options(case))
            wanted = trial.call(inputs, trial.options(case), trial.spec.reference)
        # Views of an input require a gradient in every mode, those of the contract too.
        if any(y.requires_grad > right.requires_grad for y, right in zip(outputs, wanted, strict=True)):
            raise Failure(f"an output requires a gradient under {type(context).__name__}")
        if trial.spec.same_bits:
            demand_same_bits(trial.spec, trained, Run(outputs, {}), f"{type(context).__name__} changes the results")
        used = max(used, trial.judge(case, Run(detached(outputs), {}, bool(forward))))
    return used


PROPERTY = Property(*of_file(check), share=0.3)

"""Every kind of argument that the contract allows gives correct results: leading dimensions, numbers as tensors.

Where arguments have several dtypes, the contract names that of the results. What returns the widest dtype instead, as
PyTorch's promotion does, differs in a way that is seen at once, and loses nothing: it is not judged there. Nor is a
kind with an option that a backend lacks.
"""

import torch
from torch import Tensor

from conformance.case import LAYOUTS, Case
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Inputs, Spec
from conformance.tolerances.gates import Unchecked
from conformance.trial import Lacking, Run, Trial


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """One case, which each kind of argument changes."""
    return [spec.case(6, 70)] if spec.argument_kinds else []


def check(trial: Trial, case: Case) -> float:
    """Judge each kind of argument in turn."""
    used, lacking = 0.0, 0
    for kind in trial.spec.argument_kinds.values():
        inputs, options = kind(trial.inputs(case), trial.options(case))
        changed = case.with_options(options)
        try:
            grad_outputs = _gradients(trial, changed, inputs)
            run = trial.run(changed, inputs, grad_outputs=grad_outputs)
        except Lacking:
            lacking += 1
            continue
        if not _promotes(trial, inputs, run):
            used = max(used, trial.judge(changed, run, inputs, grad_outputs))
    if lacking == len(trial.spec.argument_kinds):
        raise Unchecked("the backend lacks an option of every kind")
    return used


def _gradients(trial: Trial, case: Case, inputs: Inputs) -> list[Tensor]:
    """Those of the outputs; no view joins the leading dimensions of one that has several."""
    outputs = trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs
    return [LAYOUTS["transposed"](g) if g.ndim > 2 else g for g in trial.grad_outputs(case, outputs)]


def _promotes(trial: Trial, inputs: Inputs, run: Run) -> bool:
    """Whether inputs are wider than the dtype under test, and so are all outputs."""
    wide = torch.float32 if any(t.dtype == torch.float32 for t in inputs.values()) else trial.dtype
    return wide != trial.dtype and all(output.dtype == wide for output in run.outputs)


PROPERTY = Property(*of_file(check), cases=cases)

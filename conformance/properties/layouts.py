"""Strides and storage offsets do not matter: of any one input, or of the gradient coming back, which sum expands."""

from dataclasses import replace

from conformance.case import LAYOUTS, Case
from conformance.gates import Failure
from conformance.trial import Trial

SHARE = 0.2


def check(trial: Trial, case: Case) -> float:
    """Every layout of each input by itself, and of the gradient of each output."""
    inputs, used = trial.inputs(case), 0.0
    outputs = trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs
    for layout in LAYOUTS:
        laid_out = trial.inputs(replace(case, layout=layout))
        for name in inputs:
            mixed = {**inputs, name: laid_out[name]}
            with _naming(f"{name} {layout}"):
                used = max(used, trial.judge(case, trial.run(case, mixed), mixed))
        for index, name in enumerate(trial.spec.outputs):
            grad_outputs = trial.grad_outputs(case, outputs)
            grad_outputs[index] = LAYOUTS[layout](grad_outputs[index])
            with _naming(f"grad_output of {name} {layout}"):
                used = max(used, trial.judge(case, trial.run(case, grad_outputs=grad_outputs), inputs, grad_outputs))
    return used


class _naming:
    """Puts the layout in front of a failure's message."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Failure):
            raise Failure(f"{self._what}: {error}", error.used) from error

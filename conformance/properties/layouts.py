"""Strides and storage offsets do not matter: of any one input, or of the gradient coming back.

That of `y.sum()` is one number, with a stride of 0 in every dimension.
"""

from dataclasses import replace

from conformance.case import LAYOUTS, Case
from conformance.gates import Failure
from conformance.trial import Trial

SHARE = 0.2
OF_GRADIENTS = {
    **LAYOUTS,
    "one number": lambda values: values.flatten()[0].expand(values.shape) if values.numel() else values,
}


def check(trial: Trial, case: Case) -> float:
    """Every layout of each input by itself, and of the gradient of each output."""
    inputs, used = trial.inputs(case), 0.0
    outputs = trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs
    for layout in LAYOUTS:
        laid_out = trial.inputs(replace(case, layout=layout))
        for name in inputs:
            mixed = {**inputs, name: laid_out[name]}
            with naming(f"{name} {layout}"):
                used = max(used, trial.judge(case, trial.run(case, mixed), mixed))
    for layout, lay_out in OF_GRADIENTS.items():
        for index, name in enumerate(trial.spec.outputs):
            grad_outputs = trial.grad_outputs(case, outputs)
            grad_outputs[index] = lay_out(grad_outputs[index])
            with naming(f"grad_output of {name} {layout}"):
                used = max(used, trial.judge(case, trial.run(case, grad_outputs=grad_outputs), inputs, grad_outputs))
    return used


class naming:
    """Puts the layout in front of a failure's message."""

    def __init__(self, what: str) -> None:
        """What the layout is, and whose."""
        self._what = what

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Name it."""
        if isinstance(error, Failure):
            raise Failure(f"{self._what}: {error}", error.used) from error

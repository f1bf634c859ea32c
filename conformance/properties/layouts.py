"""Strides and storage offsets do not matter: of the inputs, nor of the gradient that comes back, which sum expands."""

from dataclasses import replace

from conformance.case import LAYOUTS, Case
from conformance.gates import Failure
from conformance.trial import Trial

SHARE = 0.2


def check(trial: Trial, case: Case) -> float:
    """Every layout of the inputs, then every layout of the gradients of the outputs."""
    used = 0.0
    for layout in LAYOUTS:
        laid_out = replace(case, layout=layout)
        inputs = trial.inputs(case)
        outputs = trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs
        grad_outputs = [LAYOUTS[layout](gradient) for gradient in trial.grad_outputs(case, outputs)]
        with _naming(f"inputs {layout}"):
            used = max(used, trial.judge(laid_out, trial.run(laid_out)))
        with _naming(f"grad_output {layout}"):
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

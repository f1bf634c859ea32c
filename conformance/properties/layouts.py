"""Any strides and storage offset of an input or of the gradient of an output give correct results.

The gradient of `y.sum()` is a single number, expanded with a stride of 0 in every dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from conformance.case import LAYOUTS, Case
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Trial

OF_GRADIENTS = {
    **LAYOUTS,
    "one number": lambda values: values.flatten()[0].expand(values.shape) if values.numel() else values,
}


def check(trial: Trial, case: Case) -> float:
    """Judge every layout of each input by itself, then of the gradient of each output."""
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


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Prefix the message of a failure with what caused it, such as a tensor and its layout."""
    try:
        yield
    except Failure as failure:
        raise Failure(f"{what}: {failure}", failure.used) from failure


PROPERTY = Property(*of_file(check), share=0.2)

"""The output and gradient of a row keep their bits when all other rows change, even to NaN."""

from math import nan

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, bits


def check(trial: Trial, case: Case) -> None:
    """Keep the first, the middle and the last row in turn, and change all the others."""
    case = trial.rowwise(case)
    count = max(2, case.size(trial.spec.row_dimension))
    case = case.resized(**{trial.spec.row_dimension: count})
    inputs = trial.inputs(case)
    outputs = trial.run(case, inputs, grads=()).outputs
    if any(output.ndim == 0 for output in outputs):
        raise Failure(f"output is a scalar under {trial.spec.row_options}, should have one entry per row")
    grad_outputs = trial.grad_outputs(case, outputs)
    first = trial.run(case, inputs, grad_outputs=grad_outputs)
    for kept in sorted({0, count // 2, count - 1}):
        for change in (lambda t: t.flip(0) * 2, lambda t: t * nan):
            changed = dict(inputs)
            for name in trial.spec.rowwise:
                if inputs[name].is_floating_point():
                    changed[name] = change(inputs[name])
                    changed[name][kept] = inputs[name][kept]
            _demand_same_row(trial, first, trial.run(case, changed, grad_outputs=grad_outputs), kept)


def _demand_same_row(trial: Trial, first: Run, second: Run, kept: int) -> None:
    for (key, name, one), (_, _, other) in zip(first.named(trial.spec), second.named(trial.spec), strict=True):
        if key in (*trial.spec.outputs, *trial.spec.rowwise) and not bits(one[kept]).equal(bits(other[kept])):
            raise Failure(f"row {kept} of {name} changed when the other rows changed")


PROPERTY = Property(*of_file(check), share=0.25, needs=("rows",))

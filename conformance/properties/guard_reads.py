"""No memory outside the inputs is read: results have the same bits between guard bands of NaN and of zeros."""

from math import nan

from conformance.case import Case
from conformance.memory import Fence
from conformance.property import Property
from conformance.trial import Run, Trial, demand_same_bits


def check(trial: Trial, case: Case) -> None:
    """Compare a run between NaN with a run between zeros."""
    inputs = trial.inputs(case)
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs)

    def between(band: float) -> Run:
        fenced = {n: Fence(t, band).tensor if t.is_floating_point() else t for n, t in inputs.items()}
        return trial.run(case, fenced, grad_outputs=[Fence(gradient, band).tensor for gradient in grad_outputs])

    demand_same_bits(trial.spec, between(nan), between(0.0), "the memory around the inputs changes the results")


PROPERTY = Property.of_file(check, share=0.4)

"""Nothing is read outside: the bits are the same whether inputs lie between NaN or between zeros."""

from math import nan

from conformance.case import Case
from conformance.memory import Fence
from conformance.trial import Run, Trial, demand_same_bits

SHARE = 0.4


def check(trial: Trial, case: Case) -> None:
    """Run between NaN, run between zeros."""
    inputs = trial.inputs(case)
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs)

    def between(band: float) -> Run:
        fenced = {n: Fence(t, band).tensor if t.is_floating_point() else t for n, t in inputs.items()}
        return trial.run(case, fenced, grad_outputs=[Fence(gradient, band).tensor for gradient in grad_outputs])

    demand_same_bits(trial.spec, between(nan), between(0.0), "what lies around the inputs shows in the results")

"""NaN and infinity in a row go where the formulas send them, and nowhere else; an ignored row stays exactly zero."""

from math import inf, nan

from conformance.case import Case
from conformance.trial import Trial

SHARE = 0.2


def check(trial: Trial, case: Case) -> float:
    """Each special value in the first element of the first row and the last element of the last row."""
    case, used = trial.rowwise(case), 0.0
    for name in trial.spec.rowwise:
        for value in (nan, inf, -inf):
            for where in (0, -1):
                inputs = trial.inputs(case)
                if not inputs[name].is_floating_point() or not inputs[name].numel():
                    continue
                inputs[name][where, where] = value
                # Where an infinity meets a zero derivative, formulas that are equal elsewhere differ: forward alone.
                grads = trial.spec.grads if value != value else ()
                used = max(used, trial.judge(case, trial.run(case, inputs, grads=grads), inputs))
    return used

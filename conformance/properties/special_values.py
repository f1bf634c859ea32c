"""NaN and infinity in a row go where the formulas send them, and nowhere else; an ignored row stays exactly zero."""

from conformance.case import Case
from conformance.trial import Trial

SHARE = 0.2


def check(trial: Trial, case: Case) -> float:
    """Each special value in the first element of the first row, in the middle, and in the last of the last row."""
    return max(_at_every_place(trial, case) for case in {case: None, trial.rowwise(case): None})


def _at_every_place(trial: Trial, case: Case) -> float:
    used = 0.0
    for name in trial.spec.rowwise:
        for value in trial.spec.specials:
            for fraction in (0.0, 0.5, 1.0):
                inputs = trial.inputs(case)
                if not inputs[name].is_floating_point():
                    continue
                where = tuple(int(fraction * (size - 1) + 0.5) for size in inputs[name].shape)
                inputs[name][where] = value
                # Where an infinity meets a zero derivative, formulas that are equal elsewhere differ: forward alone.
                grads = trial.spec.grads if value != value else ()
                used = max(used, trial.judge(case, trial.run(case, inputs, grads=grads), inputs))
    return used

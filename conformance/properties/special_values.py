"""NaN and infinity propagate only where the formulas propagate them; an ignored row gives exactly zero."""

from conformance.case import Case
from conformance.property import Property
from conformance.trial import Trial


def check(trial: Trial, case: Case) -> float:
    """Put each special value at the start, in the middle and at the end of each row-wise input."""
    return max(_at_every_place(trial, case) for case in dict.fromkeys((case, trial.rowwise(case))))


def _at_every_place(trial: Trial, case: Case) -> float:
    used = 0.0
    for name in trial.spec.rowwise:
        for value in trial.spec.special_values:
            for fraction in (0.0, 0.5, 1.0):
                inputs = trial.inputs(case)
                if not inputs[name].is_floating_point():
                    continue
                where = tuple(int(fraction * (size - 1) + 0.5) for size in inputs[name].shape)
                inputs[name][where] = value
                # Infinity times a zero derivative depends on how a formula is written: judge the forward pass alone.
                grads = trial.spec.grads if value != value else ()
                used = max(used, trial.judge(case, trial.run(case, inputs, grads=grads), inputs))
    return used


PROPERTY = Property.of_file(check, share=0.2, needs=("rows",))

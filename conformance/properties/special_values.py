"""NaN and infinity propagate only where the formulas propagate them; an ignored row gives exactly zero.

Autograd multiplies a gradient of 0 by NaN. Where the outputs of a row are finite, a gradient of 0 is as good.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import nan

import torch
from torch import Tensor

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.trial import Run, Trial


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
                peer = trial.run(case, inputs, function=trial.spec.reference, grads=grads)
                run = _with_nan_for_zeros(trial.run(case, inputs, grads=grads), peer, trial.spec.rowwise)
                used = max(used, trial.judge(case, run, inputs, peer=peer))
    return used


def _with_nan_for_zeros(run: Run, peer: Run, rowwise: Sequence[str]) -> Run:
    """The run with NaN in the gradients of rows that are 0, although NaN, beside finite outputs of the reference."""
    grads = dict(run.grads)
    for name in (name for name in rowwise if name in grads):
        gradient, wanted = grads[name], peer.grads[name]
        if gradient.shape == wanted.shape and all(y.shape[:1] == gradient.shape[:1] for y in peer.outputs):
            quiet = torch.stack([_of_rows(y.isfinite()) for y in peer.outputs] + [_of_rows(gradient == 0)]).all(0)
            quiet = quiet.view(-1, *(1,) * (gradient.ndim - 1))
            grads[name] = gradient.masked_fill(quiet & wanted.isnan(), nan)
    return replace(run, grads=grads)


def _of_rows(flags: Tensor) -> Tensor:
    return flags.reshape(len(flags), -1).all(1)


PROPERTY = Property(*of_file(check), share=0.2, needs=("rows",))

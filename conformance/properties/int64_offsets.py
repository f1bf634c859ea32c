"""Offsets past 2^31 elements are right.

Two rows of a view with a row stride of 2^31: nine gigabytes of addresses, of which only the two rows are ever touched.
"""

import torch

from conformance.case import Case
from conformance.gates import Failure
from conformance.profiles import Profile
from conformance.spec import Spec
from conformance.trial import Trial

LARGE = True
STRIDE = 2**31


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """Two rows of one tile."""
    return [spec.case(2, 130)]


def check(trial: Trial, case: Case) -> float:
    """Spread each row-wise input in turn."""
    used = 0.0
    for name in trial.spec.rowwise:
        inputs = trial.inputs(case)
        rows = inputs[name]
        if not rows.is_floating_point():
            continue
        buffer = torch.empty(STRIDE + rows[1].numel(), dtype=rows.dtype, device=rows.device)
        far = buffer.as_strided(rows.shape, (STRIDE, *rows.stride()[1:])).copy_(rows)
        if not far[1].equal(rows[1]):
            raise Failure("this machine does not hold nine gigabytes of addresses")
        used = max(used, trial.judge(case, trial.run(case, {**inputs, name: far}), inputs))
    return used

"""Under autocast the results are right for the inputs given: an operation that works in float32 loses nothing to it."""

import torch

from conformance.case import Case
from conformance.trial import Trial

SHARE = 0.3


def check(trial: Trial, case: Case) -> float:
    """Forward under autocast to bfloat16, backward outside, as training does."""
    with torch.autocast(trial.device, torch.bfloat16):
        run = trial.run(case)
    return trial.judge(case, run)

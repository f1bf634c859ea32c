"""Under activation checkpointing, of either kind, results are as right as those of the plain call."""

from typing import Any

from torch.utils.checkpoint import checkpoint

from conformance.case import Case
from conformance.gates import Failure
from conformance.trial import Trial

SHARE = 0.2


def check(trial: Trial, case: Case) -> float:
    """Recompute in the backward pass, judge."""
    used = 0.0
    for reentrant in (False, True):

        def recomputed(*inputs: Any, reentrant: bool = reentrant, **options: Any) -> Any:
            return checkpoint(lambda *xs: trial.function(*xs, **options), *inputs, use_reentrant=reentrant)

        try:
            used = max(used, trial.judge(case, trial.run(case, function=recomputed)))
        except Failure as failure:
            raise Failure(f"checkpoint(use_reentrant={reentrant}): {failure}", failure.used) from failure
    return used

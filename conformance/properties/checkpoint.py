"""Under activation checkpointing, of either kind, results are right, with the bits of the plain call."""

from typing import Any

from torch.utils.checkpoint import checkpoint

from conformance.case import Case
from conformance.gates import Failure
from conformance.trial import Trial, demand_same_bits

SHARE = 0.2


def check(trial: Trial, case: Case) -> float:
    """Recompute in the backward pass, judge."""
    plain, used = trial.run(case), 0.0
    for reentrant in (False, True):

        def recomputed(*inputs: Any, reentrant: bool = reentrant, **options: Any) -> Any:
            return checkpoint(lambda *xs: trial.function(*xs, **options), *inputs, use_reentrant=reentrant)

        law, run = f"checkpoint(use_reentrant={reentrant})", trial.run(case, function=recomputed)
        if trial.spec.same_bits:
            demand_same_bits(trial.spec, plain, run, f"{law} changes the results")
        try:
            used = max(used, trial.judge(case, run))
        except Failure as failure:
            raise Failure(f"{law}: {failure}", failure.used) from failure
    return used

"""Under activation checkpointing, of either kind, the bits are those of the plain call."""

from typing import Any

from torch.utils.checkpoint import checkpoint

from conformance.case import Case
from conformance.trial import Trial, demand_same_bits

SHARE = 0.2


def check(trial: Trial, case: Case) -> None:
    """Recompute in the backward pass, compare."""
    plain = trial.run(case)
    for reentrant in (False, True):

        def recomputed(*inputs: Any, reentrant: bool = reentrant, **options: Any) -> Any:
            return checkpoint(lambda *xs: trial.function(*xs, **options), *inputs, use_reentrant=reentrant)

        law = f"checkpoint(use_reentrant={reentrant}) changes the results"
        demand_same_bits(trial.spec, plain, trial.run(case, function=recomputed), law)

"""Activation checkpointing, reentrant or not, gives the same bits as a call without it, and correct results."""

from typing import Any

from torch.utils.checkpoint import checkpoint

from conformance.calling import results
from conformance.case import Case
from conformance.properties.layouts import naming
from conformance.property import Property, of_file
from conformance.trial import Trial, demand_same_bits


def check(trial: Trial, case: Case) -> float:
    """Run with recomputation in the backward pass, and judge."""
    direct, used = trial.run(case), 0.0
    for reentrant in (False, True):

        def recomputed(*inputs: Any, reentrant: bool = reentrant, **options: Any) -> Any:
            def function(*xs: Any) -> tuple[Any, ...]:  # checkpoint sees no tensors in lists
                return tuple(results(trial.function(*xs, **options), []))

            return checkpoint(function, *inputs, use_reentrant=reentrant)

        name, run = f"checkpoint(use_reentrant={reentrant})", trial.run(case, function=recomputed)
        if trial.spec.same_bits:
            demand_same_bits(trial.spec, direct, run, f"{name} changes the results")
        with naming(name):
            used = max(used, trial.judge(case, run))
    return used


PROPERTY = Property(*of_file(check), share=0.2, needs=("a copy",))

"""Each dropout of a model, and that of an adapter, acts in training, and none in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conformance.laws._law import Law
from conformance.property import of_file
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Caught

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial

RUNS = 8  # of which the variation is known up to a tenth
WITHIN = 1.25  # of each other: half the dropouts, half the rate or no scale make it 1.4 to 2 times as small, if linear


def check(trial: ModelTrial) -> None:
    """One dropout after the other, by the variation of the logits from run to run; packed too where a trainer packs."""
    from conformance.models.adapting import with_adapter
    from conformance.models.building import DROPOUT, dropouts_of

    packs, acting = not trial.obstacles, 0
    for name in dropouts_of(trial.subject.config()):
        dropping = replace(trial, subject=replace(trial.subject, dropout=name))
        acting += _compare(dropping, name, dropping.untouched, dropping.placed, packs)

    def adapted() -> Any:
        return with_adapter(trial.untouched(), dropout=DROPOUT)

    with suppress(Unchecked):  # experts, whose weights take none
        acting += _compare(trial, "lora_dropout", adapted, lambda: trial.placed(model=adapted()), packs)
    if not acting:
        raise Unchecked("no dropout changes what the untouched model computes")


def _compare(
    trial: ModelTrial, name: str, untouched: Callable[[], Any], placed: Callable[[], Any], packs: bool
) -> bool:
    """Raise Failure if the placed model has another dropout; returns whether the untouched one has any."""
    padded, usual = trial.documents.padded(), 0.0
    with Caught():
        usual = _variation(trial, untouched(), padded)
    if not usual:
        return False
    model = placed()
    for how, batch in (("padded", padded), ("packed", trial.documents.packed()))[: 1 + packs]:
        found = _variation(trial, model.train(), batch)
        if not usual / WITHIN <= found <= usual * WITHIN:
            raise Failure(
                f"{name} does not act in a {how} batch as it should\nmeasured {found:.3g}, the logits' standard "
                f"deviation over {RUNS} runs; that of the untouched model {usual:.3g}"
            )
        if _variation(trial, model.eval(), batch, 2):
            raise Failure(f"{name} acts in evaluation, in a {how} batch")
    return True


def _variation(trial: ModelTrial, model: Any, batch: dict[str, Any], runs: int = RUNS) -> float:
    """The standard deviation of the documents' logits over runs with other random numbers; a root mean square."""

    def logits(seed: int) -> Tensor:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            found = trial.logits(model, batch)
        return found[batch["attention_mask"].bool()] if "attention_mask" in batch else found[0]

    return float(torch.stack([logits(seed).float() for seed in range(runs)]).var(0).mean().sqrt())


LAW = Law(*of_file(check))

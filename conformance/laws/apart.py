"""A packed document has no gradient with respect to its neighbours' embeddings, and no bit of it depends on them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conformance.laws._law import Law
from conformance.property import of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Caught

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial

NEIGHBOURS = 8  # draws of other tokens, by which the untouched model's bits may change


def check(trial: ModelTrial) -> None:
    """For each document: a gradient of exactly 0, and the same bits with other tokens in its neighbours."""
    trial.demand_packing()
    model, documents = trial.placed(), trial.documents
    starts = [0, *torch.tensor(documents.lengths).cumsum(0).tolist()]
    for index, (start, end) in enumerate(pairwise(starts)):
        logits, embeddings = _with_leaves(trial, model, documents.packed())
        logits[0, start:end].float().square().sum().backward()
        _demand_zero(index, embeddings, start, end)
        changed = trial.logits(model, documents.with_others(index).packed())[0, start:end].detach()  # the same kernels
        moved = changed != logits[0, start:end]
        if moved.any() and not _moves_alone(trial):
            row = int(moved.any(-1).nonzero()[0])
            raise Failure(
                f"the logits of document {index} depend on its neighbours' tokens, first at its position {row}\n"
                f"measured {float((changed - logits[0, start:end]).abs().max()):.3g}, allowed 0"
            )


def _demand_zero(index: int, embeddings: list[Tensor], start: int, end: int) -> None:
    """Raise Failure for a gradient outside of the rows of the document, or for none inside."""
    gradients = [leaf.grad[0].abs().amax(-1) for leaf in embeddings if leaf.grad is not None]
    largest = torch.stack(gradients).amax(0) if gradients else torch.zeros(end)
    own, largest[start:end] = float(largest[start:end].max()), 0.0
    if not own > 0:
        raise Failure(f"document {index} has no gradient with respect to its own embeddings")
    if (largest != 0).any():  # NaN is not 0
        token = int((largest != 0).nonzero()[0])
        raise Failure(
            f"document {index} has a gradient with respect to the embedding of token {token} of the row, in another "
            f"document\nmeasured {float(largest.max()):.3g}, allowed 0; the largest of its own {own:.3g}"
        )


def _with_leaves(trial: ModelTrial, model: Any, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what the input embedding returned, as leaves of the graph."""
    leaves: list[Tensor] = []

    def cut(module: object, args: object, outputs: Tensor) -> Tensor:
        leaves.append(outputs.detach().requires_grad_())
        return leaves[-1].clone()  # some models change it in place

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        return trial.logits(model, batch), leaves
    finally:
        hook.remove()


def _moves_alone(trial: ModelTrial) -> bool:
    """Whether a document of the untouched model changes bits with others, as products of experts' groups may.

    In rows of its own; and packed into one row, where the untouched model takes that.
    """
    model, documents = trial.untouched(), trial.documents
    starts = [0, *torch.tensor(documents.lengths).cumsum(0).tolist()]
    for index, (start, end) in enumerate(pairwise(starts)):
        drawn = [documents, *(documents.with_others(index, seed) for seed in range(NEIGHBOURS))]
        with torch.no_grad():
            alone = [trial.logits(model, each.padded())[index] for each in drawn]
            with Caught() as caught:
                packed = [trial.logits(model, each.packed())[0, start:end] for each in drawn]
        for rows in (alone,) if caught.error is not None else (alone, packed):
            if not all(torch.equal(row, rows[0]) for row in rows):
                return True
    return False


LAW = Law(*of_file(check))

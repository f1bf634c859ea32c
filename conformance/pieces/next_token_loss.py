"""The loss of each position against the next token."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from conformance.gates import ErrorModel, Failure, judge
from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import batches, demand_equal, labels, plain
from conformance.spec import Call
from conformance.specs.cross_entropy import spec as cross_entropy_spec
from unsloth_ref import kernels, training
from unsloth_ref.types import IGNORE_INDEX


@dataclass(frozen=True)
class LossCase(PieceCase):
    """One batch.

    Attributes:
        lengths: of its rows; the rest of a row is ignored.
        vocab: number of classes.
        num_items: None for the batch's own number of targets.
        label_smoothing: in percent.
        seed: seeds logits and labels.
    """

    lengths: tuple[int, ...]
    vocab: int = 5
    num_items: int | None = None
    label_smoothing: int = 0
    seed: int = 0


def draw(elements: int) -> st.SearchStrategy[LossCase]:
    """Small batches: the operation itself has a spec of its own."""
    return st.builds(
        LossCase,
        lengths=batches(),
        vocab=st.sampled_from([5, 1, 33]),
        num_items=st.sampled_from([None, 1, 7]),
        label_smoothing=st.sampled_from([0, 10]),
        seed=st.integers(0, 3),
    )


def _inputs(case: LossCase, device: str) -> tuple[Tensor, Tensor]:
    """Logits in float32, labels."""
    found = labels(case.lengths, case.vocab, case.seed, device)
    generator = Generator().manual_seed(case.seed)
    return torch.randn(*found.shape, case.vocab, generator=generator).to(device), found


def _run(function: Any, case: LossCase, logits: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the logits."""
    leaf = logits.clone().requires_grad_()
    options = {"num_items": case.num_items, "label_smoothing": case.label_smoothing / 100}
    loss = function(leaf, found, cross_entropy=kernels.cross_entropy, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def value(trial: PieceTrial, case: LossCase) -> float:
    """Loss and gradient are within the gates of the float64 reference."""
    logits, found = _inputs(case, trial.device)
    seen = _run(trial.function, case, logits, found)
    peer = _run(training.next_token_loss, case, logits, found)
    truth = _run(training.next_token_loss, case, logits.double(), found)
    inputs = {"logits": logits.double().flatten(0, 1), "labels": training.shift_labels(found).flatten()}
    options = {"num_items": case.num_items, "label_smoothing": case.label_smoothing / 100}
    info = torch.finfo(torch.float32)
    one = [torch.ones((), dtype=torch.float64, device=trial.device)]
    call = Call(inputs, options, one, info.smallest_normal, info.eps / 2)
    used = 0.0
    for name, y, r, p in zip(("loss", "logits"), seen, truth, peer, strict=True):
        terms = cross_entropy_spec.terms[name](call).view(r.shape)
        used = max(used, judge(name, y, r, p, ErrorModel(terms, logits.numel(), roundings=0)))
    return used


def last_position_untrained(trial: PieceTrial, case: LossCase) -> None:
    """The last position foretells nothing, and nothing that is ignored is foretold: gradients of exactly 0."""
    logits, found = _inputs(case, trial.device)
    _, gradient = _run(trial.function, case, logits, found)
    idle = torch.ones_like(found, dtype=torch.bool)
    idle[:, :-1] = found[:, 1:] == IGNORE_INDEX
    if gradient[idle].any():
        raise Failure(f"gradient at positions without target: {gradient[idle].abs().max():.3g}")


def inputs_untouched(trial: PieceTrial, case: LossCase) -> None:
    """What is given is as it was afterwards."""
    given = _inputs(case, trial.device)
    before = plain(given)
    trial.function(*given, cross_entropy=kernels.cross_entropy)
    demand_equal(plain(given), before, "arguments after the call")


def _call(logits: Tensor, found: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (logits, found), {"cross_entropy": kernels.cross_entropy}


piece = Piece(
    op="next_token_loss",
    draw=draw,
    laws=(value, last_position_untrained, inputs_untouched),
    plain=LossCase((3,)),
    mistakes=(
        Mistake("logits of one row", lambda: _call(torch.ones(3, 5), torch.ones(1, 3).long()), ValueError, "logits"),
        Mistake("a label too few", lambda: _call(torch.ones(1, 3, 5), torch.ones(1, 2).long()), ValueError, "labels"),
        Mistake("float labels", lambda: _call(torch.ones(1, 3, 5), torch.ones(1, 3)), TypeError, "labels"),
    ),
)

"""The loss of each position against the label of the next one."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import batches, comparable, demand_equal, labels
from conformance.spec import Call
from conformance.specs.cross_entropy import spec as cross_entropy_spec
from conformance.tolerances.gates import ErrorModel, Failure, judge
from unsloth_ref import kernels, training
from unsloth_ref.types import IGNORE_INDEX


@dataclass(frozen=True)
class LossCase(PieceCase):
    """One batch.

    Attributes:
        lengths: the lengths of the rows; the rest of a row is ignored.
        vocab: the number of classes.
        num_items: None divides by the number of targets of the batch.
        tensor: whether num_items is a tensor, as `count_targets` returns it.
        ignore_index: the label of tokens that are not targets.
        label_smoothing: in percent.
        seed: the seed of logits and labels.
    """

    lengths: tuple[int, ...]
    vocab: int = 5
    num_items: int | None = None
    tensor: bool = False
    ignore_index: int = IGNORE_INDEX
    label_smoothing: int = 0
    seed: int = 0


def draw(elements: int) -> st.SearchStrategy[LossCase]:
    """Draw small batches; the operation itself has its own spec."""
    return st.builds(
        LossCase,
        lengths=batches(),
        vocab=st.sampled_from([5, 1, 33]),
        num_items=st.sampled_from([None, 1, 7]),
        tensor=st.booleans(),
        ignore_index=st.sampled_from([IGNORE_INDEX, 0]),
        label_smoothing=st.sampled_from([0, 10]),
        seed=st.integers(0, 3),
    )


def _inputs(case: LossCase, device: str) -> tuple[Tensor, Tensor]:
    """Logits in float32, and labels."""
    found = labels(case.lengths, case.vocab, case.seed, device)
    found[found == IGNORE_INDEX] = case.ignore_index
    generator = Generator().manual_seed(case.seed)
    return torch.randn(*found.shape, case.vocab, generator=generator).to(device), found


def _options(case: LossCase) -> dict[str, Any]:
    others = {"num_items": case.num_items, "label_smoothing": case.label_smoothing / 100}
    return others if case.ignore_index == IGNORE_INDEX else others | {"ignore_index": case.ignore_index}


def _run(function: Any, case: LossCase, logits: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the logits."""
    leaf = logits.clone().requires_grad_()
    options = _options(case)
    if case.tensor and case.num_items is not None:
        options["num_items"] = torch.tensor(case.num_items, device=found.device)
    loss = function(leaf, found, cross_entropy=kernels.cross_entropy, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def value(trial: PieceTrial, case: LossCase) -> float:
    """Loss and gradient pass the gates against the float64 reference."""
    logits, found = _inputs(case, trial.device)
    seen = _run(trial.function, case, logits, found)
    peer = _run(training.next_token_loss, case, logits, found)
    truth = _run(training.next_token_loss, case, logits.double(), found)
    targets = training.shift_labels(found, case.ignore_index).flatten()
    inputs = {"logits": logits.double().flatten(0, 1), "labels": targets}
    one = [torch.ones((), dtype=torch.float64, device=trial.device)]
    call = Call(inputs, _options(case), one, torch.float32)
    used = 0.0
    for name, y, r, p in zip(("loss", "logits"), seen, truth, peer, strict=True):
        error = cross_entropy_spec.budget.error(name, call, r).reshape(r.shape)
        used = max(used, judge(name, y, r, p, ErrorModel(error, logits.numel(), roundings=0)))
    return used


def last_position_untrained(trial: PieceTrial, case: LossCase) -> None:
    """Gradients are exactly 0 at the last position and at positions whose next label is ignored."""
    logits, found = _inputs(case, trial.device)
    _, gradient = _run(trial.function, case, logits, found)
    idle = torch.ones_like(found, dtype=torch.bool)
    idle[:, :-1] = found[:, 1:] == case.ignore_index
    if gradient[idle].any():
        raise Failure(f"gradient at positions without a target: {gradient[idle].abs().max():.3g}")


def loss_in_float32(trial: PieceTrial, case: LossCase) -> None:
    """The loss of logits in 16 bits has the bits of the loss of the same numbers in float32."""
    logits, found = _inputs(case, trial.device)
    narrow = logits.bfloat16()
    (seen, _), (wanted, _) = (_run(trial.function, case, one, found) for one in (narrow, narrow.float()))
    demand_equal(comparable(seen), comparable(wanted), "loss of bfloat16 logits")


def inputs_untouched(trial: PieceTrial, case: LossCase) -> None:
    """The call does not modify its arguments."""
    given = _inputs(case, trial.device)
    before = comparable(given)
    trial.function(*given, cross_entropy=kernels.cross_entropy)
    demand_equal(comparable(given), before, "arguments after the call")


def _call(logits: Tensor, found: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (logits, found), {"cross_entropy": kernels.cross_entropy}


piece = Piece(
    op="next_token_loss",
    draw=draw,
    checks=(value, last_position_untrained, loss_in_float32, inputs_untouched),
    simplest=LossCase((3,)),
    mistakes=(
        Mistake(
            "logits of two dimensions", lambda: _call(torch.ones(3, 5), torch.ones(1, 3).long()), ValueError, "logits"
        ),
        Mistake("one label too few", lambda: _call(torch.ones(1, 3, 5), torch.ones(1, 2).long()), ValueError, "labels"),
        Mistake("float labels", lambda: _call(torch.ones(1, 3, 5), torch.ones(1, 3)), TypeError, "labels"),
    ),
)

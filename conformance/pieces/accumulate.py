"""The gradients of one step, over several microbatches."""

import torch
from torch import Tensor

from conformance.gates import Failure
from conformance.piece import Mistake, Piece, PieceTrial
from conformance.pieces._shared import demand_equal, plain
from conformance.pieces._windows import Bigram, StepsCase, allowed, draw, joined, windows
from conformance.trial import Function


def _run(function: Function, window: list[dict[str, Tensor]], device: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = Bigram(device)
    loss = function(model.loss_of, window)
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _demand_close(trial: PieceTrial, case: StepsCase, window: list[dict[str, Tensor]], function: Function) -> float:
    loss, grads = _run(trial.function, windows(case, trial.device), trial.device)
    wanted, wanted_grads = _run(function, window, trial.device)
    if not isinstance(loss, Tensor) or loss.shape != () or loss.dtype != torch.float64 or loss.requires_grad:
        raise Failure(f"loss is {loss!r}, should be a 0-dim float64 tensor without a graph")
    if grads.keys() != wanted_grads.keys():
        raise Failure(f"gradients of {', '.join(grads) or 'nothing'}, should be of {', '.join(wanted_grads)}")
    limit = allowed(case, weights=3)
    worst = 0.0
    for name, seen, right in [("loss", loss, wanted), *((n, grads[n], wanted_grads[n]) for n in grads)]:
        error = float((seen - right).abs().max())
        if not error <= limit:
            raise Failure(
                f"{name}: {seen.tolist()}, should be {right.tolist()}; error {error:.2g}, allowed {limit:.2g}"
            )
        worst = max(worst, error / limit)
    return worst


def close(trial: PieceTrial, case: StepsCase) -> float:
    """Loss and gradients are the reference's, up to the rounding of float64."""
    return _demand_close(trial, case, windows(case, trial.device), trial.spec.reference)


def accumulated_equals_full_batch(trial: PieceTrial, case: StepsCase) -> float:
    """However a batch is cut into microbatches, loss and gradients are those of the whole."""
    return _demand_close(trial, case, [joined(windows(case, trial.device))], trial.spec.reference)


def adds(trial: PieceTrial, case: StepsCase) -> None:
    """Gradients are added to those that are there."""
    model = Bigram(trial.device)
    trial.function(model.loss_of, windows(case, trial.device))
    once = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    trial.function(model.loss_of, windows(case, trial.device))
    twice = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    limit = 2 * allowed(case, weights=3)
    if len(once) != len(twice) or any(((2 * a - b).abs() > limit).any() for a, b in zip(once, twice, strict=True)):
        raise Failure(f"after two calls gradients are {twice}, should be twice {once}")


def inputs_untouched(trial: PieceTrial, case: StepsCase) -> None:
    """The microbatches are as they were afterwards."""
    given = windows(case, trial.device)
    before = plain(given)
    _run(lambda loss_of, window: trial.function(loss_of, window), given, trial.device)
    demand_equal(plain(given), before, "window after the call")


piece = Piece(
    op="accumulate",
    draw=draw,
    laws=(close, accumulated_equals_full_batch, adds, inputs_untouched),
    plain=StepsCase(((3, 2),)),
    mistakes=(Mistake("no microbatch", lambda: ((Bigram("cpu").loss_of, []), {}), ValueError, "window"),),
)

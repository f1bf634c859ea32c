"""The training loop."""

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from conformance.gates import Failure
from conformance.piece import Mistake, Piece, PieceTrial
from conformance.pieces._shared import Arguments
from conformance.pieces._windows import Bigram, StepsCase, allowed, draw, joined, windows
from conformance.trial import Function

RATE = 0.125


def _run(
    function: Function, microbatches: list[dict[str, Tensor]], accumulation: int, device: str, scheduled: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Losses, and the weights after training; the rate falls to a half and then a third of itself, and so on."""
    model = Bigram(device)
    optimizer = SGD(model.parameters(), lr=RATE)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1)) if scheduled else None
    losses = function(model.loss_of, iter(microbatches), optimizer, accumulation=accumulation, scheduler=scheduler)
    return losses, [parameter.detach() for parameter in model.parameters()]


def _demand_close(
    case: StepsCase, seen: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]], steps: int
) -> float:
    losses, weights = seen
    if not isinstance(losses, Tensor) or losses.shape != (steps,) or losses.device.type != "cpu":
        raise Failure(f"losses are {losses!r}, should be {steps} on the CPU, one a step")
    # A step multiplies an error of the weights by at most 1 + RATE times the curvature, which the weights' size bounds:
    # 4 for weights up to 3 in two factors.
    limit = allowed(case, weights=3) * steps * (1 + 4 * RATE * 3) ** steps
    pairs = [("losses", losses, wanted[0]), *zip(("embedding", "head"), weights, wanted[1], strict=True)]
    worst = 0.0
    for name, one, other in pairs:
        error = float((one - other).abs().max())
        if not error <= limit:
            raise Failure(f"{name}: {one.tolist()}, should be {other.tolist()}; error {error:.2g}, allowed {limit:.2g}")
        worst = max(worst, error / limit)
    return worst


def close(trial: PieceTrial, case: StepsCase) -> float:
    """Losses and weights are the reference's, up to the rounding of float64; with and without a scheduler."""
    steps = -(-len(case.microbatches) // case.accumulation)
    worst = 0.0
    for scheduled in (True, False):
        seen, wanted = (
            _run(function, windows(case, trial.device), case.accumulation, trial.device, scheduled)
            for function in (trial.function, trial.spec.reference)
        )
        worst = max(worst, _demand_close(case, seen, wanted, steps))
    return worst


def accumulated_equals_full_batch(trial: PieceTrial, case: StepsCase) -> float:
    """Windows of microbatches, the last of them shorter, train as the same windows in one batch each."""
    found = windows(case, trial.device)
    whole = [joined(found[first : first + case.accumulation]) for first in range(0, len(found), case.accumulation)]
    seen = _run(trial.function, found, case.accumulation, trial.device)
    return _demand_close(case, seen, _run(trial.spec.reference, whole, 1, trial.device), len(whole))


def fresh_gradients(trial: PieceTrial, case: StepsCase) -> None:
    """Gradients from before training count for nothing."""
    left = []
    for gradient in (None, 1.0):
        model = Bigram(trial.device)
        for parameter in model.parameters():
            parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
        trial.function(model.loss_of, windows(case, trial.device), SGD(model.parameters(), lr=RATE))
        left.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    if not torch.equal(*left):
        raise Failure(f"weights after training: {left[1].tolist()}, should be {left[0].tolist()}")


def no_microbatch(trial: PieceTrial, case: StepsCase) -> None:
    """Nothing to train on: no loss and no step."""
    losses, weights = _run(trial.function, [], case.accumulation, trial.device)
    untouched = [parameter.detach() for parameter in Bigram(trial.device).parameters()]
    if losses.shape != (0,) or not all(map(torch.equal, weights, untouched)):
        raise Failure(f"losses are {losses!r}, should be none; weights {weights}")


def _call(accumulation: int | float) -> Arguments:
    model = Bigram("cpu")
    return (model.loss_of, [], SGD(model.parameters(), lr=RATE)), {"accumulation": accumulation}


piece = Piece(
    op="train",
    draw=draw,
    laws=(close, accumulated_equals_full_batch, fresh_gradients, no_microbatch),
    plain=StepsCase(((3, 2),)),
    mistakes=(
        Mistake("steps of no microbatch", lambda: _call(0), ValueError, "accumulation"),
        Mistake("steps of half a microbatch", lambda: _call(0.5), TypeError, "accumulation"),
    ),
)

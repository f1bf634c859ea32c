"""Inputs of linear_cross_entropy, and the properties that both backends are tested for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unsloth_ref.types import IGNORE_INDEX

FLOAT64: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}  # a hundred roundings, far below a step in float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"logit_scale": 0.5, "softcap": 3.0},
    {"label_smoothing": 0.1, "z_loss": 0.01},
    {"reduction": "none", "softcap": 2.0},
    {"reduction": "sum", "num_items": 3},
]
Function = Callable[..., Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs_of(
    rows: int = 9, columns: int = 6, vocab: int = 11, dtype: torch.dtype = torch.float64, ignored: float = 0.3
) -> Inputs:
    """Hidden, weight, labels and bias, the same in every call; all except labels require gradients."""
    rng = torch.Generator().manual_seed(rows + columns + vocab)
    shapes = (rows, columns), (vocab, columns), (vocab,)
    hidden, weight, bias = (torch.randn(shape, generator=rng).to(DEVICE, dtype).requires_grad_() for shape in shapes)
    labels = torch.randint(vocab, (rows,), generator=rng)
    return hidden, weight, labels.masked_fill(torch.rand(rows, generator=rng) < ignored, IGNORE_INDEX).to(DEVICE), bias


def with_gradients(function: Function, inputs: Inputs, dloss: float = 1.0, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of hidden, weight and bias."""
    hidden, weight, labels, bias = inputs
    loss = function(hidden, weight, labels, bias, **options)
    scale = torch.linspace(dloss, 2 * dloss, loss.numel(), dtype=loss.dtype, device=DEVICE).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias), scale)]


def check_that_parts_add_up(
    linear_cross_entropy: Function, parts: int, dtype: torch.dtype, tolerance: dict[str, Any]
) -> None:
    """Losses of parts, each divided by the number of targets in the whole batch, and their gradients."""
    hidden, weight, labels, bias = inputs_of(dtype=dtype)
    items = (labels != IGNORE_INDEX).sum()
    whole = linear_cross_entropy(hidden, weight, labels, bias)
    losses = [
        linear_cross_entropy(h, weight, y, bias, num_items=items)
        for h, y in zip(hidden.chunk(parts), labels.chunk(parts), strict=True)
    ]
    torch.testing.assert_close(torch.stack(losses).sum(), whole, **tolerance)
    leaves = hidden, weight, bias
    of_parts, of_whole = (torch.autograd.grad(loss, leaves) for loss in (torch.stack(losses).sum(), whole))
    for part, full in zip(of_parts, of_whole, strict=True):
        torch.testing.assert_close(part, full, **tolerance)


def check_that_ignored_rows_of_nan_have_no_effect(
    linear_cross_entropy: Function, dtype: torch.dtype, assert_equal: Callable[[Tensor, Tensor], object]
) -> None:
    """Their gradient is exactly 0; the loss and all other gradients equal those without the ignored rows."""
    hidden, weight, labels, bias = inputs_of(dtype=dtype)
    kept = labels != IGNORE_INDEX
    with torch.no_grad():
        hidden[~kept] = float("nan")
    found = with_gradients(linear_cross_entropy, (hidden, weight, labels, bias))
    without = (hidden.detach()[kept].requires_grad_(), weight, labels[kept], bias)
    expected = with_gradients(linear_cross_entropy, without)
    assert 0 < int(kept.sum()) < len(kept)
    assert not found[1][~kept].any()
    found[1] = found[1][kept]
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def check_that_all_is_zero_without_targets(linear_cross_entropy: Function) -> None:
    """The loss and all gradients."""
    hidden, weight, labels, bias = inputs_of(dtype=torch.float32)
    for found in with_gradients(linear_cross_entropy, (hidden, weight, labels.fill_(IGNORE_INDEX), bias)):
        assert not found.any()

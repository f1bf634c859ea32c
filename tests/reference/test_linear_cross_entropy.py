"""The reference linear_cross_entropy against PyTorch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy, linear

from tests.operations.linear_cross_entropy import (
    FLOAT64,
    OPTIONS,
    check_that_all_is_zero_without_targets,
    check_that_ignored_rows_of_nan_have_no_effect,
    check_that_parts_add_up,
    inputs_of,
)
from unsloth_ref.kernels import linear_cross_entropy


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 7),
    columns=st.integers(1, 6),
    vocab=st.integers(1, 9),
    biased=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["none", "sum"]),
)
def test_agrees_with_torch(
    rows: int, columns: int, vocab: int, biased: bool, label_smoothing: float, reduction: Any
) -> None:
    """The loss is that of a linear layer, then cross entropy."""
    hidden, weight, labels, bias = inputs_of(rows, columns, vocab)
    last = bias if biased else None
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}
    ours = linear_cross_entropy(hidden, weight, labels, last, **options)
    theirs = cross_entropy(linear(hidden, weight, last), labels, **options)
    torch.testing.assert_close(ours, theirs, **FLOAT64)
    leaves = [hidden, weight, *([bias] if biased else [])]
    for mine, other in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_derivatives(options: dict[str, Any]) -> None:
    """First and second derivatives agree with finite differences."""
    hidden, weight, labels, bias = inputs_of(4, 3, 5)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias, **options)

    assert gradcheck(loss, (hidden, weight, bias))
    assert gradgradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_add_up(parts: int) -> None:
    check_that_parts_add_up(linear_cross_entropy, parts, torch.float64, FLOAT64)


def test_ignored_rows_of_nan_have_no_effect() -> None:
    def assert_close(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other, **FLOAT64)

    check_that_ignored_rows_of_nan_have_no_effect(linear_cross_entropy, torch.float64, assert_close)


def test_all_is_zero_without_targets() -> None:
    check_that_all_is_zero_without_targets(linear_cross_entropy)

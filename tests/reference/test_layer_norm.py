"""The reference layer_norm against values worked by hand, its formulas in numpy, PyTorch and transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import layer_norm as torch_layer_norm
from transformers.models.cohere.modeling_cohere import CohereLayerNorm

from tests.operations.leaves import randn
from unsloth_ref.kernels import layer_norm

# Float64 on rows of up to 16: fewer than 30 roundings of 1.1e-16 of numbers below 100 sum to less than 4e-13; a
# single rounding in float32 (6e-8) is larger.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def test_values_worked_by_hand() -> None:
    """The mean is 4, deviations are (-3, 3) and the population variance is 9, so r is 1/3 and n = (-1, 1)."""
    x, weight, bias = (
        torch.tensor(v, dtype=torch.float64).requires_grad_() for v in ([1.0, 7.0], [2.0, 10.0], [1, 3.0])
    )
    y = layer_norm(x, weight, bias, 0.0)
    torch.testing.assert_close(y.tolist(), [-1.0, 13.0], **FLOAT64)
    dx, dweight, dbias = grad(y, (x, weight, bias), torch.tensor([1.0, 0.5], dtype=torch.float64))
    # g = (2, 5), mean 3.5, mean(g n) = 1.5: g - 3.5 - 1.5 n = (0, 0): with two columns dx is always 0
    torch.testing.assert_close(dx.tolist(), [0.0, 0.0], **FLOAT64)
    torch.testing.assert_close(dweight.tolist(), [-1.0, 0.5], **FLOAT64)
    torch.testing.assert_close(dbias.tolist(), [1.0, 0.5], **FLOAT64)


def test_eps_is_added_to_the_variance() -> None:
    """A variance of 1 and an eps of 3 give r = 1/2."""
    x = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    assert layer_norm(x, torch.ones(4), torch.zeros(4), 3.0).tolist() == [-0.5, 0.5, 0.5, -0.5]


def test_a_constant_row_gives_the_bias() -> None:
    """Its deviations from the mean are zero."""
    bias = randn(5, dtype=torch.float32).detach()
    assert layer_norm(torch.full((2, 5), 1000.0), torch.ones(5), bias).equal(bias.expand(2, 5))


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    """Deviations of 1 lie around 10000, where a difference of squares cancels in float32."""
    x = 10000 + torch.tensor([-1.0, 1.0]).repeat(50)
    torch.testing.assert_close(layer_norm(x, torch.ones(100), torch.zeros(100)), x - 10000, rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    hidden=st.integers(1, 16),
    eps=st.sampled_from([0.01, 0.5]),
    scale=st.sampled_from([1.0, 0.0]),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(leading: list[int], hidden: int, eps: float, scale: float, seed: int) -> None:
    """Forward and backward agree with the docstring's formulas in numpy."""
    x, weight = (scale * randn(*leading, hidden, seed=seed)).detach().requires_grad_(), randn(hidden, seed=seed + 1)
    bias, dy = randn(hidden, seed=seed + 2), randn(*leading, hidden, seed=seed + 3).detach()
    y = layer_norm(x, weight, bias, eps)
    dx, dweight, dbias = grad(y, (x, weight, bias), dy)

    rows, w, g_out = x.detach().numpy(), weight.detach().numpy(), dy.numpy()
    m = rows.mean(-1, keepdims=True)
    r = 1 / np.sqrt(((rows - m) ** 2).mean(-1, keepdims=True) + eps)
    n = (rows - m) * r
    g = g_out * w
    right_dx = r * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))
    torch.testing.assert_close(y.detach().numpy(), w * n + bias.detach().numpy(), **FLOAT64)
    torch.testing.assert_close(dx.numpy(), right_dx, **FLOAT64)
    torch.testing.assert_close(dweight.numpy(), (g_out * n).reshape(-1, hidden).sum(0), **FLOAT64)
    torch.testing.assert_close(dbias.numpy(), g_out.reshape(-1, hidden).sum(0), **FLOAT64)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gradients_are_the_derivatives(eps: float) -> None:
    """First and second derivatives agree with finite differences."""
    inputs = randn(3, 5), randn(5, seed=1), randn(5, seed=2)
    assert gradcheck(lambda *tensors: layer_norm(*tensors, eps), inputs)
    assert gradgradcheck(lambda *tensors: layer_norm(*tensors, eps), inputs)


def test_agrees_with_pytorch_in_float64() -> None:
    """Value and gradients are those of torch.nn.functional.layer_norm."""
    inputs, dy = (randn(2, 3, 16), randn(16, seed=1), randn(16, seed=2)), randn(2, 3, 16, seed=3)
    ours, theirs = layer_norm(*inputs, 1e-6), torch_layer_norm(inputs[0], (16,), *inputs[1:], 1e-6)
    torch.testing.assert_close(ours, theirs, **FLOAT64)
    torch.testing.assert_close(grad(ours, inputs, dy), grad(theirs, inputs, dy), **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_once_as_pytorch(dtype: torch.dtype) -> None:
    """Result and gradients are those of float32, rounded; torch's own differ only by the order of sums."""
    x, weight, bias = randn(31, 257, dtype=dtype), randn(257, dtype=dtype, seed=1), randn(257, dtype=dtype, seed=2)
    inputs, dy = (x, weight, bias), randn(31, 257, dtype=dtype, seed=3)
    y, wide = layer_norm(*inputs), layer_norm(*(tensor.float() for tensor in inputs))
    assert torch.equal(y, wide.to(dtype))
    for ours, exact in zip(grad(y, inputs, dy), grad(wide, inputs, dy.float()), strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, exact)  # both were rounded to the dtype of the leaf
    tolerance = torch.finfo(dtype).eps + 2.0**-19  # the neighbouring number, and some 20 roundings of terms around 2
    torch.testing.assert_close(y, torch_layer_norm(x, (257,), weight, bias), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_cohere_without_its_bias(dtype: torch.dtype) -> None:
    """transformers' own norm without a bias computes in float32 and rounds once."""
    norm = CohereLayerNorm(257, eps=1e-5).to(dtype)
    weight = norm.weight = torch.nn.Parameter(randn(257, dtype=dtype, seed=1))
    x = randn(2, 31, 257, dtype=dtype)
    assert torch.equal(layer_norm(x, weight, torch.zeros(257, dtype=dtype)), norm(x))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_empty_rows_give_empty_rows(shape: tuple[int, ...]) -> None:
    """Without rows or columns the result has the shape of x; without rows the gradients of weight and bias are 0."""
    x, weight, bias = randn(*shape), randn(shape[-1]), randn(shape[-1])
    y = layer_norm(x, weight, bias)
    dx, dweight, dbias = grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))

"""The reference rms_norm against values worked by hand, its formulas in numpy, PyTorch and transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import rms_norm as torch_rms_norm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.operations.leaves import randn
from unsloth_ref.kernels import rms_norm
from unsloth_ref.types import Casting

# Float64 on rows of up to 16: fewer than 30 roundings of 1.1e-16 of numbers below 100 sum to less than 4e-13; a
# single rounding in float32 (6e-8) is larger.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
OPTIONS: list[dict[str, Any]] = [{}, {"eps": 0.5, "offset": 1.0, "casting": "gemma"}, {"eps": 0.0, "offset": -0.5}]


def test_values_worked_by_hand() -> None:
    """The mean of 1 and 49 is 25, so r is 1/5 and n = (0.2, 1.4); weight + offset = (3, 11)."""
    x = torch.tensor([1.0, 7.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([2.0, 10.0], dtype=torch.float64, requires_grad=True)
    y = rms_norm(x, weight, 0.0, offset=1.0)
    torch.testing.assert_close(y.tolist(), [0.6, 15.4], **FLOAT64)
    # dy = (1, 0): g = (3, 0), mean(g * n) = 0.3, dx = ((3, 0) - 0.3 * (0.2, 1.4)) / 5
    dx, dweight = grad(y, (x, weight), torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(dx.tolist(), [0.588, -0.084], **FLOAT64)
    torch.testing.assert_close(dweight.tolist(), [0.2, 0.0], **FLOAT64)


def test_eps_is_added_to_the_mean_square() -> None:
    """A mean square of 1 and an eps of 3 give r = 1/2."""
    assert rms_norm(torch.ones(4), torch.ones(4), 3.0).tolist() == [0.5] * 4


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    hidden=st.integers(1, 16),
    eps=st.sampled_from([0.01, 0.5]),
    offset=st.sampled_from([0.0, 1.0]),
    casting=st.sampled_from(["llama", "gemma"]),
    scale=st.sampled_from([1.0, 0.0]),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(
    leading: list[int], hidden: int, eps: float, offset: float, casting: Casting, scale: float, seed: int
) -> None:
    """Forward and backward agree with the docstring's formulas in numpy; in float64 both castings are the same."""
    x, weight = (scale * randn(*leading, hidden, seed=seed)).detach().requires_grad_(), randn(hidden, seed=seed + 1)
    dy = randn(*leading, hidden, seed=seed + 2).detach()
    y = rms_norm(x, weight, eps, offset=offset, casting=casting)
    dx, dweight = grad(y, (x, weight), dy)

    rows, w, g_out = x.detach().numpy(), weight.detach().numpy(), dy.numpy()
    r = 1 / np.sqrt((rows**2).mean(-1, keepdims=True) + eps)
    n = rows * r
    g = g_out * (offset + w)
    torch.testing.assert_close(y.detach().numpy(), (offset + w) * n, **FLOAT64)
    torch.testing.assert_close(dx.numpy(), r * (g - n * (g * n).mean(-1, keepdims=True)), **FLOAT64)
    torch.testing.assert_close(dweight.numpy(), (g_out * n).reshape(-1, hidden).sum(0), **FLOAT64)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_derivatives(options: dict[str, Any]) -> None:
    """First and second derivatives agree with finite differences."""
    inputs = randn(3, 5), randn(5, seed=1)
    assert gradcheck(lambda x, w: rms_norm(x, w, **options), inputs)
    assert gradgradcheck(lambda x, w: rms_norm(x, w, **options), inputs)


def test_agrees_with_pytorch_in_float64() -> None:
    """Value and gradients are those of torch.nn.functional.rms_norm."""
    x, weight, dy = randn(2, 3, 16), randn(16, seed=1), randn(2, 3, 16, seed=2)
    ours, theirs = rms_norm(x, weight, 1e-5), torch_rms_norm(x, (16,), weight, 1e-5)
    torch.testing.assert_close(ours, theirs, **FLOAT64)
    torch.testing.assert_close(grad(ours, (x, weight), dy), grad(theirs, (x, weight), dy), **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "module", [LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, GemmaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm]
)
def test_same_bits_as_transformers(module: type[torch.nn.Module], dtype: torch.dtype) -> None:
    """The same order of rounding gives the same bits, forward and backward, with one exception where ours rounds less.

    Llama's weight gradient in half precision: transformers rounds each row's term before the sum, we round the sum.
    """
    gemma = "Gemma" in module.__name__
    norm = module(257, eps=1e-5).to(dtype)
    weight = norm.weight = torch.nn.Parameter(randn(257, dtype=dtype, seed=1))
    x, dy = randn(2, 31, 257, dtype=dtype), randn(2, 31, 257, dtype=dtype, seed=2)
    theirs = norm(x)
    ours = rms_norm(x, weight, 1e-5, offset=float(gemma), casting="gemma" if gemma else "llama")
    assert torch.equal(ours, theirs)
    (dx, dweight), (their_dx, their_dweight) = (grad(y, (x, weight), dy) for y in (ours, theirs))
    assert torch.equal(dx, their_dx)
    if gemma or dtype == torch.float32:
        assert torch.equal(dweight, their_dweight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gemma_casting_rounds_once(dtype: torch.dtype) -> None:
    """Half precision rows and a float32 weight give the float32 result, rounded; gradients have their input's dtype."""
    x, weight, dy = randn(4, 33, dtype=dtype), randn(33, dtype=torch.float32, seed=1), randn(4, 33, dtype=dtype, seed=2)
    y, wide = (rms_norm(rows, weight, casting="gemma") for rows in (x, x.float()))
    assert torch.equal(y, wide.to(dtype))
    for ours, exact in zip(grad(y, (x, weight), dy), grad(wide, (x, weight), dy.float()), strict=True):
        assert ours.dtype == exact.dtype
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_empty_rows_give_empty_rows(shape: tuple[int, ...]) -> None:
    """Without rows or columns the result has the shape of x; without rows the weight's gradient is 0."""
    x, weight = randn(*shape), randn(shape[-1])
    y = rms_norm(x, weight)
    dx, dweight = grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))

"""The reference add_rms_norm against values worked by hand, its formulas in numpy, and a decoder layer's two steps."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.operations.leaves import randn
from unsloth_ref.kernels import add_rms_norm, rms_norm
from unsloth_ref.types import Casting

# Float64 on rows of up to 16: fewer than 30 roundings of 1.1e-16 of numbers below 100 sum to less than 4e-13; a
# single rounding in float32 (6e-8) is larger.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
OPTIONS: list[dict[str, Any]] = [{}, {"eps": 0.5, "offset": 1.0, "casting": "gemma"}, {"eps": 0.0, "offset": -0.5}]


def test_values_worked_by_hand() -> None:
    """The sum is (1, 7), whose mean square 25 gives r = 1/5 and n = (0.2, 1.4); weight + offset = (3, 11)."""
    x, residual, weight = (
        torch.tensor(v, dtype=torch.float64).requires_grad_() for v in ([-1.0, 3.0], [2.0, 4.0], [2.0, 10.0])
    )
    normed, total = add_rms_norm(x, residual, weight, 0.0, offset=1.0)
    assert total.tolist() == [1.0, 7.0]
    torch.testing.assert_close(normed.tolist(), [0.6, 15.4], **FLOAT64)
    # dnormed = (1, 0): g = (3, 0), mean(g * n) = 0.3, ((3, 0) - 0.3 * (0.2, 1.4)) / 5; plus dsum = (10, 20)
    dnormed, dsum = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0], [10.0, 20.0]))
    dx, dresidual, dweight = grad((normed, total), (x, residual, weight), (dnormed, dsum))
    torch.testing.assert_close(dx.tolist(), [10.588, 19.916], **FLOAT64)
    assert torch.equal(dx, dresidual)
    torch.testing.assert_close(dweight.tolist(), [0.2, 0.0], **FLOAT64)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    hidden=st.integers(1, 16),
    eps=st.sampled_from([0.01, 0.5]),
    offset=st.sampled_from([0.0, 1.0]),
    casting=st.sampled_from(["llama", "gemma"]),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(
    leading: list[int], hidden: int, eps: float, offset: float, casting: Casting, seed: int
) -> None:
    """Forward and backward agree with the docstring's formulas in numpy; in float64 both castings are the same."""
    x, residual, weight = (
        randn(*s, seed=seed + i) for i, s in enumerate([(*leading, hidden), (*leading, hidden), (hidden,)])
    )
    dnormed, dsum = (randn(*leading, hidden, seed=seed + i).detach() for i in (3, 4))
    normed, total = add_rms_norm(x, residual, weight, eps, offset=offset, casting=casting)
    dx, dresidual, dweight = grad((normed, total), (x, residual, weight), (dnormed, dsum))

    rows, w = (x + residual).detach().numpy(), weight.detach().numpy()
    r = 1 / np.sqrt((rows**2).mean(-1, keepdims=True) + eps)
    n = rows * r
    g = dnormed.numpy() * (offset + w)
    assert np.array_equal(total.detach().numpy(), rows)
    torch.testing.assert_close(normed.detach().numpy(), (offset + w) * n, **FLOAT64)
    right_dx = dsum.numpy() + r * (g - n * (g * n).mean(-1, keepdims=True))
    torch.testing.assert_close(dx.numpy(), right_dx, **FLOAT64)
    assert torch.equal(dx, dresidual)
    torch.testing.assert_close(dweight.numpy(), (dnormed.numpy() * n).reshape(-1, hidden).sum(0), **FLOAT64)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_derivatives(options: dict[str, Any]) -> None:
    """First and second derivatives of both outputs agree with finite differences."""
    inputs = randn(3, 5), randn(3, 5, seed=1), randn(5, seed=2)
    assert gradcheck(lambda *tensors: add_rms_norm(*tensors, **options), inputs)
    assert gradgradcheck(lambda *tensors: add_rms_norm(*tensors, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [LlamaRMSNorm, GemmaRMSNorm])
def test_same_bits_as_a_decoder_layer(module: type[torch.nn.Module], dtype: torch.dtype) -> None:
    """Hidden states = residual + hidden states, then the norm: both outputs, and the gradients if one is used.

    Where both are, a decoder layer adds two rounded gradients and we round their sum.
    """
    gemma = module is GemmaRMSNorm
    norm = module(257, eps=1e-5).to(dtype)
    weight = norm.weight = torch.nn.Parameter(randn(257, dtype=dtype, seed=1))
    x, residual = randn(2, 31, 257, dtype=dtype), randn(2, 31, 257, dtype=dtype, seed=2)
    dnormed, dsum = randn(2, 31, 257, dtype=dtype, seed=3), randn(2, 31, 257, dtype=dtype, seed=4)
    their_sum = residual + x
    theirs = norm(their_sum)
    ours, our_sum = add_rms_norm(x, residual, weight, 1e-5, offset=float(gemma), casting="gemma" if gemma else "llama")
    assert torch.equal(our_sum, their_sum)
    assert torch.equal(ours, theirs)
    for y, their_y, dy in ((ours, theirs, dnormed), (our_sum, their_sum, dsum)):
        (dx,), (their_dx,) = (grad(value, (x,), dy, retain_graph=True) for value in (y, their_y))
        assert torch.equal(dx, their_dx)
    (dx,) = grad((ours, our_sum), (x,), (dnormed, dsum))
    (their_dx,) = grad((theirs, their_sum), (x,), (dnormed, dsum))
    torch.testing.assert_close(dx, their_dx, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_the_gradients_of_both_outputs_are_added_before_the_rounding() -> None:
    """In bfloat16 the gradient is that of float32, rounded once, although both outputs are used."""
    x, residual, weight = (randn(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate([(9, 33), (9, 33), (33,)]))
    dnormed, dsum = (randn(9, 33, dtype=torch.bfloat16, seed=i) for i in (3, 4))
    (dx,) = grad(add_rms_norm(x, residual, weight, casting="gemma"), (x,), (dnormed, dsum))
    total = (x + residual).detach().float().requires_grad_()
    wide = rms_norm(total, weight.float(), casting="gemma"), total * 1
    (exact,) = grad(wide, (total,), (dnormed.float(), dsum.float()))
    assert torch.equal(dx, exact.bfloat16())


@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_the_norm_is_that_of_the_rounded_sum(casting: Casting) -> None:
    """The normalised values are those of the residual stream."""
    x, residual, weight = (randn(*s, dtype=torch.float16, seed=i) for i, s in enumerate([(4, 33), (4, 33), (33,)]))
    normed, total = add_rms_norm(x, residual, weight, casting=casting)
    assert torch.equal(total, (x.double() + residual.double()).half())
    assert torch.equal(normed, rms_norm(total, weight, casting=casting))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_empty_rows_give_empty_rows(shape: tuple[int, ...]) -> None:
    """Without rows or columns both outputs have the shape of x; without rows the weight's gradient is 0."""
    x, residual, weight = randn(*shape), randn(*shape, seed=1), randn(shape[-1])
    normed, total = add_rms_norm(x, residual, weight)
    dx, dresidual, dweight = grad(normed.sum() + total.sum(), (x, residual, weight))
    assert normed.shape == total.shape == dx.shape == dresidual.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))

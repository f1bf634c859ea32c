"""The reference swiglu against values worked by hand, its formulas in numpy, and transformers' LlamaMLP."""

from math import log
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.operations.leaves import randn
from unsloth_ref.kernels import swiglu

# Float64, element by element: ten roundings of 1.1e-16 of terms below 500 sum to less than 6e-13; a single step in
# float32 (6e-8) does not.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def test_values_worked_by_hand() -> None:
    """The sigmoids of 0, ln 3 and -ln 3 are 1/2, 3/4 and 1/4; ln 3 = 1.0986122886681098."""
    gate = torch.tensor([0.0, log(3), -log(3)], dtype=torch.float64, requires_grad=True)
    up = torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = swiglu(gate, up)
    dgate, dup = grad(y.sum(), (gate, up))
    torch.testing.assert_close(y.tolist(), [0.0, 1.6479184330021646, -0.5493061443340549], **FLOAT64)
    # 4 / 2;  2 * 3/4 * (1 + ln 3 / 4);  2 * 1/4 * (1 - 3/4 * ln 3)
    torch.testing.assert_close(dgate.tolist(), [2.0, 1.9119796082505412, 0.08802039174945885], **FLOAT64)
    torch.testing.assert_close(dup.tolist(), [0.0, 0.8239592165010823, -0.27465307216702745], **FLOAT64)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    scale=st.sampled_from([1.0, 1e-3, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(shape: list[int], scale: float, seed: int) -> None:
    """Forward and backward agree with the docstring's formulas in numpy, for any shape, empty ones too."""
    gate, up = ((scale * randn(*shape, seed=seed + i)).detach().requires_grad_() for i in range(2))
    dy = randn(*shape, seed=seed + 2).detach()
    y = swiglu(gate, up)
    dgate, dup = grad(y, (gate, up), dy)

    a, b, g = gate.detach().numpy(), up.detach().numpy(), dy.numpy()
    s = 1 / (1 + np.exp(-a))
    torch.testing.assert_close(y.detach().numpy(), a * s * b, **FLOAT64)
    torch.testing.assert_close(dgate.numpy(), g * b * s * (1 + a * (1 - s)), **FLOAT64)
    torch.testing.assert_close(dup.numpy(), g * a * s, **FLOAT64)


def test_gradients_are_the_derivatives() -> None:
    """First and second derivatives agree with finite differences."""
    inputs = randn(3, 5), randn(3, 5, seed=1)
    assert gradcheck(swiglu, inputs)
    assert gradgradcheck(swiglu, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_transformers(dtype: torch.dtype) -> None:
    """Value and gradients are those of LlamaMLP before its down projection, from its own gate and up."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=65, num_attention_heads=2)).to(dtype)
    seen = {}
    mlp.gate_proj.register_forward_hook(lambda module, args, output: seen.update(gate=output))
    mlp.up_proj.register_forward_hook(lambda module, args, output: seen.update(up=output))
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update(product=args[0]))
    mlp(randn(4, 8, dtype=dtype))
    inputs = seen["gate"], seen["up"]
    ours, dy = swiglu(*inputs), randn(4, 65, dtype=dtype, seed=1)
    assert torch.equal(ours, seen["product"])
    for our_grad, their_grad in zip(grad(ours, inputs, dy), grad(seen["product"], inputs, dy), strict=True):
        assert torch.equal(our_grad, their_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_far_from_zero_the_share_is_0_or_1(dtype: torch.dtype) -> None:
    """exp(8192) overflows every dtype; the sigmoid is then exactly 1 or 0, and nothing is NaN."""
    gate = torch.tensor([8192.0, -8192.0], dtype=dtype, requires_grad=True)
    up = torch.tensor([2.0, 2.0], dtype=dtype, requires_grad=True)
    y = swiglu(gate, up)
    dgate, dup = grad(y.sum(), (gate, up))
    assert y.tolist() == [16384.0, 0.0]
    assert dgate.tolist() == [2.0, 0.0]
    assert dup.tolist() == [8192.0, 0.0]

"""The reference geglu against values worked by hand, its formulas in plain Python, PyTorch and transformers."""

from math import erfc, exp, pi, sqrt, tanh
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from transformers import GemmaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP

from tests.operations.leaves import randn
from unsloth_ref.kernels import geglu
from unsloth_ref.types import Approximate

# Float64, element by element: twenty roundings of 1.1e-16 of terms below 200 sum to less than 5e-13; a single step in
# float32 (6e-8) does not.
FLOAT64: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
FORMS: list[Approximate] = ["none", "tanh"]


def test_values_of_the_normal_table() -> None:
    """Phi(0) = 1/2, Phi(1) = 0.8413447460685429, Phi(-1.96) = 0.024997895148220435; phi(1) = 0.24197072451914337."""
    gate = torch.tensor([0.0, 1.0, -1.96], dtype=torch.float64, requires_grad=True)
    up = torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = geglu(gate, up)
    dgate, dup = grad(y.sum(), (gate, up))
    torch.testing.assert_close(y.tolist(), [0.0, 1.6826894921370859, -0.0979917489810241], **FLOAT64)
    torch.testing.assert_close(dup.tolist(), [0.0, 0.8413447460685429, -0.04899587449051205], **FLOAT64)
    # 4 / 2;  2 * (Phi(1) + phi(1))
    torch.testing.assert_close(dgate.tolist()[:2], [2.0, 2.1666309411753726], **FLOAT64)


def share_and_slope(x: float, approximate: str) -> tuple[float, float]:
    """a / gate and a' by the docstring's formulas."""
    if approximate == "none":
        share = erfc(-x / sqrt(2)) / 2
        return share, share + x * exp(-x * x / 2) / sqrt(2 * pi)
    c = sqrt(2 / pi)
    t = tanh(c * (x + 0.044715 * x**3))
    return (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * x * x)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    approximate=st.sampled_from(FORMS),
    scale=st.sampled_from([1.0, 1e-3, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_formulas_of_the_docstring(shape: list[int], approximate: Approximate, scale: float, seed: int) -> None:
    """Forward and backward agree element by element, for any shape, including empty ones."""
    gate, up = ((scale * randn(*shape, seed=seed + i)).detach().requires_grad_() for i in range(2))
    dy = randn(*shape, seed=seed + 2).detach()
    y = geglu(gate, up, approximate=approximate)
    dgate, dup = grad(y, (gate, up), dy)

    pairs = [share_and_slope(x, approximate) for x in gate.flatten().tolist()]
    table = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    share, slope = table[:, 0].reshape(shape), table[:, 1].reshape(shape)
    torch.testing.assert_close(y, gate * share * up, **FLOAT64)
    torch.testing.assert_close(dgate, dy * up.detach() * slope, **FLOAT64)
    torch.testing.assert_close(dup, dy * gate.detach() * share, **FLOAT64)


@pytest.mark.parametrize("approximate", FORMS)
def test_gradients_are_the_derivatives(approximate: Approximate) -> None:
    """First and second derivatives agree with finite differences."""
    inputs = randn(3, 5), randn(3, 5, seed=1)
    assert gradcheck(lambda gate, up: geglu(gate, up, approximate=approximate), inputs)
    assert gradgradcheck(lambda gate, up: geglu(gate, up, approximate=approximate), inputs)


def test_both_forms_are_close_but_not_equal() -> None:
    """The largest error of the approximation is between 1e-4 and 5e-4."""
    gate, up = torch.linspace(-8, 8, 1001, dtype=torch.float64), torch.ones(1001, dtype=torch.float64)
    off = (geglu(gate, up) - geglu(gate, up, approximate="tanh")).abs().max()
    assert 1e-4 < off < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximate", FORMS)
def test_same_bits_as_transformers(approximate: Approximate, dtype: torch.dtype) -> None:
    """Value and gradients are those of GemmaMLP before its down projection, from its own gate and up."""
    mlp = GemmaMLP(GemmaConfig(hidden_size=8, intermediate_size=65, num_attention_heads=2)).to(dtype)
    if approximate == "none":
        mlp.act_fn = ACT2FN["gelu"]
    seen = {}
    mlp.gate_proj.register_forward_hook(lambda module, args, output: seen.update(gate=output))
    mlp.up_proj.register_forward_hook(lambda module, args, output: seen.update(up=output))
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update(product=args[0]))
    mlp(randn(4, 8, dtype=dtype))
    inputs = seen["gate"], seen["up"]
    ours, dy = geglu(*inputs, approximate=approximate), randn(4, 65, dtype=dtype, seed=1)
    assert torch.equal(ours, seen["product"])
    for our_grad, their_grad in zip(grad(ours, inputs, dy), grad(seen["product"], inputs, dy), strict=True):
        assert torch.equal(our_grad, their_grad)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_far_from_zero_the_share_is_0_or_1(dtype: torch.dtype, approximate: Approximate) -> None:
    """The share is exactly 0 or 1, and nothing is NaN."""
    gate = torch.tensor([8192.0, -8192.0], dtype=dtype, requires_grad=True)
    up = torch.tensor([2.0, 2.0], dtype=dtype, requires_grad=True)
    y = geglu(gate, up, approximate=approximate)
    dgate, dup = grad(y.sum(), (gate, up))
    assert y.tolist() == [16384.0, 0.0]
    assert dgate.tolist() == [2.0, 0.0]
    assert dup.tolist() == [8192.0, 0.0]

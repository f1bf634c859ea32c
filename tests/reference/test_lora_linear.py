"""The reference lora_linear against values worked by hand, its formulas in numpy, and peft's layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from tests.operations.lora_linear import CHECKS, DEVICE, inputs_of, randn
from unsloth_ref.kernels import lora_linear

# Float64: the error of a sum of at most 40 terms below 100 is below 1e-12; in float32 it would not be.
FLOAT64: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


def test_values_worked_by_hand() -> None:
    """With x = (1, 2), weight (3, 4), bias 5, lora_a (6, 7), lora_b 8: 3 + 8 + 5 + 0.5 * 8 * (6 + 14) = 96."""
    x, weight, a, b = (torch.tensor([row], dtype=torch.float64) for row in ([1, 2], [3, 4], [6, 7], [8]))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, a, b, torch.tensor([5.0], dtype=torch.float64))]
    y = lora_linear(*leaves[:4], 0.5, leaves[4])
    assert y.tolist() == [[96.0]]
    # 3 + 0.5 * 8 * 6, 4 + 0.5 * 8 * 7;  x;  0.5 * 8 x;  0.5 * (6 + 14);  1
    wanted = [[[27.0, 32.0]], [[1.0, 2.0]], [[4.0, 8.0]], [[10.0]], [1.0]]
    assert [gradient.tolist() for gradient in grad(y.sum(), leaves)] == wanted


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    sizes=st.tuples(*[st.integers(0, 5)] * 3),
    scaling=st.sampled_from([1.0, 0.3, 0.0, -2.0]),
    biased=st.booleans(),
)
def test_formulas_of_the_docstrings(lead: list[int], sizes: tuple[int, int, int], scaling: float, biased: bool) -> None:
    """Forward and backward agree with numpy, for any shape, empty ones too."""
    columns, out, rank = sizes
    _, *leaves = inputs_of(0, columns, out, rank)
    leaves = [randn(*lead, columns, seed=7), *leaves][: 5 if biased else 4]
    y = lora_linear(*leaves[:4], scaling, *leaves[4:])
    dy = randn(*lead, out, seed=8).detach()
    assert y.shape == dy.shape

    x, weight, a, b, *bias = (leaf.detach().cpu().numpy() for leaf in leaves)
    rows, g = x.reshape(int(np.prod(lead)), columns), dy.cpu().numpy().reshape(int(np.prod(lead)), out)
    flat = rows @ weight.T + sum(bias) + scaling * (rows @ a.T) @ b.T
    dlow = scaling * g @ b
    wanted = (g @ weight + dlow @ a).reshape(x.shape), g.T @ rows, dlow.T @ rows, scaling * g.T @ (rows @ a.T), g.sum(0)
    torch.testing.assert_close(y.detach().cpu().numpy(), flat.reshape(y.shape), **FLOAT64)
    for found, right in zip(grad(y, leaves, dy), wanted, strict=False):
        torch.testing.assert_close(found.cpu().numpy(), right, **FLOAT64)


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_the_derivatives(biased: bool) -> None:
    """First and second derivatives agree with finite differences."""
    inputs = inputs_of()[: 5 if biased else 4]

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        return lora_linear(x, weight, a, b, 0.3, bias)

    assert gradcheck(layer, inputs)
    assert gradgradcheck(layer, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_same_bits_as_peft(dtype: torch.dtype, biased: bool) -> None:
    """Value and gradients are those of peft's layer without dropout, with adapters in the dtype of x."""
    config = LoraConfig(r=8, lora_alpha=10, init_lora_weights=False, target_modules=["proj"])
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(48, 65, bias=biased)})
    layer: Any = inject_adapter_in_model(config, model)["proj"].to(DEVICE, dtype).requires_grad_()
    base, adapters = layer.base_layer, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    leaves = [randn(2, 7, 48, dtype=dtype), base.weight, *adapters, *([base.bias] if biased else [])]
    ours = lora_linear(*leaves[:4], 1.25, *leaves[4:])
    theirs = layer(leaves[0])
    assert torch.equal(ours, theirs)
    dy = randn(2, 7, 65, dtype=dtype, seed=1).detach()
    for our_grad, their_grad in zip(grad(ours, leaves, dy), grad(theirs, leaves, dy), strict=True):
        assert torch.equal(our_grad, their_grad)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_what_both_backends_keep(check: Callable[..., None]) -> None:
    check(lora_linear)

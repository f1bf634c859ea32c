"""The reference lora_linears against its formula in numpy, and against peft's layers."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.autograd import grad

from tests.operations.lora_linear import DEVICE, randn
from tests.operations.lora_linears import check_weights_in_4_bits, check_weights_in_float8
from unsloth_ref.kernels import lora_linears

SHAPES = ((3, 2), (6, 4), (1, 1), (0, 2))  # columns of y and rank


@pytest.mark.parametrize("count", [1, 2, 4])
def test_formulas_of_the_docstring(count: int) -> None:
    """Each layer by itself; only every second one has a bias. The gradient of x is the sum."""
    x = randn(2, 5, 7, seed=99)
    layers = [(randn(o, 7, seed=o), randn(r, 7, seed=r), randn(o, r, seed=o + r)) for o, r in SHAPES[:count]]
    bias = [None if i % 2 else randn(o, seed=40 + i) for i, (o, _) in enumerate(SHAPES[:count])]
    scaling = [0.5, 2.0, 1.0, 0.0][:count]
    found = lora_linears(x, *(list(each) for each in zip(*layers, strict=True)), scaling, bias)
    dx = np.zeros(x.shape)
    for y, layer, s, c in zip(found, layers, scaling, bias, strict=True):
        rows, w, a, b = (t.detach().cpu().numpy() for t in (x, *layer))
        wanted = rows @ w.T + s * (rows @ a.T) @ b.T + (0 if c is None else c.detach().cpu().numpy())
        np.testing.assert_allclose(y.detach().cpu().numpy(), wanted, rtol=1e-11, atol=1e-12)
        dx += w.sum(0) + s * b.sum(0) @ a
    (gradient,) = grad(sum((y.sum() for y in found), x.new_zeros(())), [x])
    np.testing.assert_allclose(gradient.cpu().numpy(), dx, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_peft(dtype: torch.dtype) -> None:
    """Its layers one after the other, without dropout, adapters in the dtype of x; values and gradients."""
    names = ("q", "k", "v")
    ranks = {"q": 8, "k": 4, "v": 2}
    config = LoraConfig(rank_pattern=ranks, lora_alpha=8, init_lora_weights=False, target_modules=list(names))
    model = torch.nn.ModuleDict({name: torch.nn.Linear(48, 33, bias=name == "q") for name in names})
    layers: list[Any] = [
        inject_adapter_in_model(config, model)[name].to(DEVICE, dtype).requires_grad_() for name in names
    ]
    x = randn(2, 7, 48, dtype=dtype)
    weight, bias = [one.base_layer.weight for one in layers], [one.base_layer.bias for one in layers]
    a, b = ([one.get_submodule(f"{part}.default").weight for one in layers] for part in ("lora_A", "lora_B"))
    ours = lora_linears(x, weight, a, b, [one.scaling["default"] for one in layers], bias)
    theirs = [one(x) for one in layers]
    dys = [randn(2, 7, 33, dtype=dtype, seed=i).detach() for i in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    leaves = [*weight, *a, *b, bias[0]]  # the gradient of x is a sum, in an order that is not defined
    for our_grad, their_grad in zip(grad(ours, leaves, dys), grad(theirs, leaves, dys), strict=True):
        assert torch.equal(our_grad, their_grad)


def test_weights_in_4_bits() -> None:
    check_weights_in_4_bits(lora_linears)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_float8(dtype: torch.dtype) -> None:
    check_weights_in_float8(lora_linears, dtype)

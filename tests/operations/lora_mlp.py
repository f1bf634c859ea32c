"""Inputs of lora_mlp, and the properties that both backends are tested for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks

from tests.operations.lora_linear import float8_weight, nf4_weight, randn
from unsloth_ref import kernels as reference

Function = Callable[..., Tensor]


def layers_of(
    rows: int = 5,
    columns: int = 7,
    inner: int = 6,
    out: int = 4,
    dtype: torch.dtype = torch.float64,
    wide: bool = False,
) -> list[Any]:
    """x with two leading dimensions, then of each layer: weight, lora_a, lora_b, scaling, and bias or None."""
    sizes = (inner, columns, 2), (inner, columns, 3), (out, inner, 1)  # outputs, inputs and rank
    adapters = torch.float32 if wide else dtype
    return [
        randn(2, rows, columns, dtype=dtype, seed=99),
        [randn(o, i, dtype=dtype, seed=n) for n, (o, i, _) in enumerate(sizes)],
        [randn(r, i, dtype=adapters, seed=10 + n) for n, (_, i, r) in enumerate(sizes)],
        [randn(o, r, dtype=adapters, seed=20 + n) for n, (o, _, r) in enumerate(sizes)],
        [0.5, 2.0, 1.0],
        [randn(inner, dtype=dtype, seed=30), None, randn(out, dtype=dtype, seed=31)],
    ]


def leaves_of(layers: list[Any]) -> list[Tensor]:
    """Its tensors, of which weights in 4 bits are none."""
    x, *groups = layers
    return [x, *(one for group in groups for one in group if isinstance(one, Tensor))]


def check_weights_in_4_bits(lora_mlp: Function) -> None:
    """The bits are those of the dequantised weights, which are not kept for the backward pass; one may be wide."""
    layers = layers_of(columns=33, inner=47, out=31, dtype=torch.float32)
    narrow = [nf4_weight(47, 33), layers[1][1], nf4_weight(31, 47)]
    wide = [
        one if isinstance(one, Tensor) else reference.nf4_dequantize(*one[:5], shape=one.shape, dtype=torch.float32)
        for one in narrow
    ]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = lora_mlp(layers[0], narrow, *layers[2:])
    expected = lora_mlp(layers[0], wide, *layers[2:])
    assert torch.equal(y, expected)
    weights = {tensor.data_ptr() for tensor in kept if tensor.numel() in (47 * 33, 31 * 47)}
    assert weights == {layers[1][1].data_ptr()}
    dy = randn(*y.shape, dtype=torch.float32, seed=9).detach()
    leaves = [one for one in leaves_of(layers) if one is not layers[1][0] and one is not layers[1][2]]
    for found, wanted in zip(grad(y, leaves, dy), grad(expected, leaves, dy), strict=True):
        assert torch.equal(found, wanted)


def check_weights_in_float8(lora_mlp: Function, dtype: torch.dtype = torch.float32) -> None:
    """Values and gradients are those of the layers and the activation, one after the other; one may be wide."""
    layers = layers_of(columns=150, inner=140, out=31, dtype=dtype, wide=True)
    x, (_, wide, _), *others = layers
    weight = [float8_weight(140, 150), wide, float8_weight(31, 140)]
    of_gate, of_up, of_down = zip(weight, *others, strict=True)
    hidden = reference.swiglu(reference.lora_linear(x, *of_gate), reference.lora_linear(x, *of_up))
    y, expected = lora_mlp(x, weight, *others), reference.lora_linear(hidden, *of_down)
    dy, leaves = randn(*y.shape, dtype=dtype, seed=9).detach(), [x, wide, *leaves_of([x, *others])[1:]]
    wanted = [expected, *grad(expected, leaves, dy)]
    for found, one in zip([y, *grad(y, leaves, dy)], wanted, strict=True):
        size = one.abs().max().item()
        torch.testing.assert_close(found, one, rtol=0, atol=16 * torch.finfo(dtype).eps * size)


def check_that_autocast_has_no_effect(lora_mlp: Function) -> None:
    """The same bits within autocast."""
    layers = layers_of(dtype=torch.float32)
    expected = lora_mlp(*layers)
    with torch.autocast(expected.device.type, torch.bfloat16):
        assert torch.equal(lora_mlp(*layers), expected)


CHECKS: dict[str, Callable[[Function], None]] = {
    "4 bits": check_weights_in_4_bits,
    "float8": check_weights_in_float8,
    "float8 beside 16 bits": partial(check_weights_in_float8, dtype=torch.bfloat16),
    "autocast": check_that_autocast_has_no_effect,
}

"""The properties of lora_linears that both backends are tested for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks

from tests.operations.lora_linear import float8_weight, nf4_weight, randn
from unsloth_ref import kernels as reference

Function = Callable[..., tuple[Tensor, ...]]


def check_weights_in_4_bits(lora_linears: Function) -> None:
    """The bits are those of the dequantised weights, which are not kept for the backward pass; one may be wide.

    Also where a layer has no gradient: the middle one, and the wide one.
    """
    x, wide = randn(2, 5, 33, dtype=torch.float32), randn(31, 33, dtype=torch.float32)
    narrow: list[Any] = [nf4_weight(47, 33), nf4_weight(29, 33), wide]
    dense = [
        one if isinstance(one, Tensor) else reference.nf4_dequantize(*one[:5], shape=one.shape, dtype=torch.float32)
        for one in narrow
    ]
    a = [randn(rank, 33, dtype=torch.float32, seed=rank) for rank in (2, 3, 1)]
    b = [randn(*shape, dtype=torch.float32, seed=9) for shape in ((47, 2), (29, 3), (31, 1))]
    others = a, b, [0.5, 2.0, 1.0], [None, randn(29, dtype=torch.float32), None]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = lora_linears(x, narrow, *others)
    expected = lora_linears(x, dense, *others)
    assert all(map(torch.equal, found, expected))
    sizes = {47 * 33, 29 * 33, 31 * 33}
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() in sizes} == {wide.data_ptr()}
    dys = [randn(*y.shape, dtype=torch.float32, seed=20 + i).detach() for i, y in enumerate(expected)]
    for used in ([0, 1, 2], [0, 2], [1], [0, 1]):
        leaves = [x, *(one[i] for one in (a, b) for i in used), *([wide] if 2 in used else [])]
        ours, theirs = (
            grad([ys[i] for i in used], leaves, [dys[i] for i in used], retain_graph=True) for ys in (found, expected)
        )
        assert all(map(torch.equal, ours, theirs))


def check_weights_in_float8(lora_linears: Function, dtype: torch.dtype = torch.float32) -> None:
    """Values and gradients are those of lora_linear, layer by layer; one is wide, and one has 4 bits."""
    x, wide = randn(2, 5, 300, dtype=dtype), randn(31, 300, dtype=dtype)
    weight: list[Any] = [float8_weight(140, 300), wide, nf4_weight(29, 300), float8_weight(47, 300)]
    outs = [140, 31, 29, 47]
    a = [randn(rank, 300, dtype=torch.float32, seed=rank) for rank in (2, 3, 1, 2)]
    b = [randn(out, one.shape[0], dtype=torch.float32, seed=9) for out, one in zip(outs, a, strict=True)]
    scaling, bias = [0.5, 2.0, 1.0, 4.0], [None, None, None, randn(47, dtype=dtype)]
    found = lora_linears(x, weight, a, b, scaling, bias)
    expected = [reference.lora_linear(x, *layer) for layer in zip(weight, a, b, scaling, bias, strict=True)]
    dys = [randn(*y.shape, dtype=dtype, seed=20 + i).detach() for i, y in enumerate(expected)]
    leaves = [x, wide, *a, *b, bias[3]]
    ours, theirs = (grad(ys, leaves, dys) for ys in (found, expected))  # type: ignore[arg-type]
    for one, wanted in zip([*found, *ours], [*expected, *theirs], strict=True):
        size = wanted.abs().max().item()
        torch.testing.assert_close(one, wanted, rtol=0, atol=16 * torch.finfo(dtype).eps * size)

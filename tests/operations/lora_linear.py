"""Inputs of lora_linear, and the properties that both backends are tested for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

from tests.operations import leaves
from unsloth_ref import kernels as reference
from unsloth_ref.types import Float8Weight, NF4Weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"rows": 6, "columns": 5, "out": 4, "rank": 3}
Function = Callable[..., Tensor]
randn = partial(leaves.randn, device=DEVICE)


def inputs_of(rows: int = 6, columns: int = 5, out: int = 4, rank: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    """x, weight, lora_a, lora_b and bias."""
    shapes = (rows, columns), (out, columns), (rank, columns), (out, rank), (out,)
    return [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def check_that_an_adapter_can_be_off(lora_linear: Function, off: str) -> None:
    """With scaling 0, or with lora_b zero as at the start of training, values and gradients are the layer's."""
    x, weight, a, b, bias = inputs_of(dtype=torch.float32)
    with torch.no_grad():
        b.mul_(0.0 if off == "lora_b" else 1.0)
    y = lora_linear(x, weight, a, b, 0.0 if off == "scaling" else 2.0, bias)
    layer, dy = linear(x, weight, bias), randn(6, 4, dtype=torch.float32, seed=9).detach()
    torch.testing.assert_close(y, layer, rtol=1e-6, atol=1e-6)
    leaves = [x, weight, bias]
    for found, wanted in zip(grad(y, leaves, dy, retain_graph=True), grad(layer, leaves, dy), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    da, db = grad(y, (a, b), dy)
    assert not da.any()
    assert bool(db.any()) == (off == "lora_b")


def check_that_autocast_has_no_effect(lora_linear: Function) -> None:
    """The same bits within autocast."""
    inputs = inputs_of(dtype=torch.float32)
    expected = lora_linear(*inputs[:4], 0.5, inputs[4])
    with torch.autocast(DEVICE, torch.bfloat16):
        found = lora_linear(*inputs[:4], 0.5, inputs[4])
    assert torch.equal(found, expected)


def check_an_empty_size(lora_linear: Function, empty: str) -> None:
    """Without columns, the bias; without a rank, the layer; without rows or outputs, gradients of zero."""
    sizes = {**SIZES, empty: 0}
    inputs = inputs_of(**sizes, dtype=torch.float32)
    y = lora_linear(*inputs[:4], 0.5, inputs[4])
    wanted = reference.lora_linear(*(t.detach().double() for t in inputs[:4]), 0.5, inputs[4].detach().double())
    torch.testing.assert_close(y.detach().double(), wanted, rtol=1e-5, atol=1e-5)
    dx, dweight, da, db, dbias = grad(y.sum(), inputs)
    assert [t.shape for t in (dx, dweight, da, db, dbias)] == [t.shape for t in inputs]
    assert dbias.tolist() == [sizes["rows"]] * sizes["out"]
    wide = inputs[0].detach().double().sum(0)
    torch.testing.assert_close(dweight.double(), wide.expand(dweight.shape), rtol=1e-5, atol=1e-5)
    assert not da.any() and not db.any()  # zeros, or no elements
    _, weight, a, b, _ = (tensor.detach().double() for tensor in inputs)
    wanted = weight.sum(0) + 0.5 * b.sum(0) @ a
    torch.testing.assert_close(dx.double(), wanted.expand(dx.shape), rtol=1e-5, atol=1e-5)


def nf4_weight(out: int, columns: int) -> NF4Weight:
    """Random bytes and scales, nested."""
    generator, blocks = torch.Generator().manual_seed(out), -(-out * columns // 64)
    packed, absmax = (
        torch.randint(256, (count,), generator=generator).to(DEVICE, torch.uint8)
        for count in (-(-out * columns // 2), blocks)
    )
    code, scales = torch.linspace(-1, 1, 256), torch.rand(-(-blocks // 256), generator=generator)
    return NF4Weight(packed, absmax, code.to(DEVICE), scales.to(DEVICE), torch.ones((), device=DEVICE), (out, columns))


def check_a_weight_in_4_bits(lora_linear: Function) -> None:
    """The bits are those of the dequantised weight, which is not kept for the backward pass."""
    x, _, a, b, bias = inputs_of(6, 33, 47, 3, torch.float32)
    weight, dy, kept = nf4_weight(47, 33), randn(6, 47, dtype=torch.float32, seed=9).detach(), list[Tensor]()
    wide = reference.nf4_dequantize(*weight[:5], shape=weight.shape, dtype=torch.float32)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = lora_linear(x, weight, a, b, 0.5, bias)
    expected = lora_linear(x, wide, a, b, 0.5, bias)
    assert torch.equal(y, expected)
    assert all(tensor.numel() < wide.numel() for tensor in kept)
    for found, wanted in zip(*(grad(one, (x, a, b, bias), dy) for one in (y, expected)), strict=True):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        assert torch.equal(lora_linear(x, weight, a, b, 0.5, bias), expected)


def float8_weight(out: int, columns: int) -> Float8Weight:
    """A matrix with a size of its own in each block, quantised."""
    sizes = 1 + (torch.arange(out) // 128)[:, None] + 2 * (torch.arange(columns) // 128)
    dense = randn(out, columns, dtype=torch.float32, seed=out).detach() * sizes.to(DEVICE)
    return Float8Weight(*reference.fp8_quantize(dense))


def check_a_weight_in_float8(lora_linear: Function) -> None:
    """Values and gradients are those of fp8_linear and of the adapter of an x that is not quantised, added up."""
    x, _, a, b, bias = inputs_of(6, 300, 140, 3, torch.float32)
    weight, dy, kept = float8_weight(140, 300), randn(6, 140, dtype=torch.float32, seed=9).detach(), list[Tensor]()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = lora_linear(x, weight, a, b, 0.5, bias)
    expected = reference.fp8_linear(x, *weight, bias) + 0.5 * linear(linear(x, a), b)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    for found, wanted in zip(*(grad(one, (x, a, b, bias), dy) for one in (y, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    if lora_linear is not reference.lora_linear:
        assert all(tensor.numel() < 140 * 300 or tensor.dtype != x.dtype for tensor in kept)
    with torch.no_grad():
        assert torch.equal(lora_linear(x, weight, a, b, 0.5, bias), y)


CHECKS: dict[str, Callable[[Function], None]] = {
    **{f"{off} off": partial(check_that_an_adapter_can_be_off, off=off) for off in ("scaling", "lora_b")},
    "autocast": check_that_autocast_has_no_effect,
    "4 bits": check_a_weight_in_4_bits,
    "float8": check_a_weight_in_float8,
    **{f"no {empty}": partial(check_an_empty_size, empty=empty) for empty in SIZES},
}

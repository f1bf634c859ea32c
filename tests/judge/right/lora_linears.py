"""Right linear layers with adapters of one input."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import Function
from tests.judge.right import lora_linear
from unsloth_ref import adapter_checks
from unsloth_ref import kernels as reference


def _lora_linears(layers: Function) -> Function:
    """Complete layers with adapters to the contract: checks, defaults, and no effect of autocast."""

    def lora_linears(
        x: Tensor,
        weight: Sequence[Tensor],
        lora_a: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        scaling: Sequence[float] | None = None,
        bias: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, ...]:
        adapter_checks.lora_layers_arguments(x, weight, lora_a, lora_b, scaling, bias)
        count = len(weight)
        with torch.autocast(x.device.type, enabled=False):
            return layers(x, weight, lora_a, lora_b, scaling or [1.0] * count, bias or [None] * count)

    return lora_linears


@_lora_linears
def of_peft(x: Tensor, *layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Layer by layer, each adapter's output in the adapter's dtype."""
    return tuple(lora_linear.of_peft(x, *layer) for layer in zip(*layers, strict=True))


@_lora_linears
def in_one_product(
    x: Tensor,
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    bias: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """One product in float32 with all merged weights below each other, rounded once."""
    merged = [w.float() + s * b.float() @ a.float() for w, a, b, s in zip(weight, lora_a, lora_b, scaling, strict=True)]
    y = F.linear(x.float(), torch.cat(merged)).split([len(w) for w in weight], -1)
    return tuple((one if c is None else one + c.float()).to(x.dtype) for one, c in zip(y, bias, strict=True))


@_lora_linears
def in_float64(x: Tensor, *layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """More exact than required."""
    return tuple(lora_linear.in_float64(x, *layer) for layer in zip(*layers, strict=True))


def in_reverse(
    x: Tensor,
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float] | None = None,
    bias: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """The last layer first, so that autograd adds the gradients of x in another order."""
    layers = (weight, lora_a, lora_b, scaling, bias)
    found = reference.lora_linears(x, *(None if each is None else [*reversed(each)] for each in layers))
    return tuple(reversed(found))


TABLE = {
    "of_peft": of_peft,
    "in_one_product": in_one_product,
    "in_float64": in_float64,
    "in_reverse": in_reverse,
}

"""Right linear layers with an adapter."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import Function
from unsloth_ref import adapter_checks
from unsloth_ref import kernels as reference
from unsloth_ref.types import Float8Weight, NF4Weight, QuantisedWeight


def _lora_linear(product: Function) -> Function:
    """Complete a layer with an adapter to the contract: checks, quantised weights, and no effect of autocast."""

    def lora_linear(
        x: Tensor,
        weight: Tensor | QuantisedWeight,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float = 1.0,
        bias: Tensor | None = None,
    ) -> Tensor:
        adapter_checks.lora_arguments(x, weight, lora_a, lora_b, bias)
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(weight, Float8Weight):
                nothing = torch.zeros(weight.shape, dtype=x.dtype, device=x.device)
                adapter = product(x, nothing, lora_a, lora_b, scaling, None)
                return reference.fp8_linear(x, *weight, bias) + adapter
            return product(x, _dense(weight, x.dtype), lora_a, lora_b, scaling, bias)

    return lora_linear


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight, dequantised if it has 4 bits."""
    if isinstance(weight, Tensor):
        return weight
    return reference.nf4_dequantize(*weight[:5], shape=weight.shape, dtype=dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A layer whose weight is not rounded to the dtype of x, and its gradient neither."""
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


@_lora_linear
def of_peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """The adapter's output is computed in the adapter's dtype."""
    return (F.linear(x, weight, bias) + F.linear(F.linear(x.to(a.dtype), a), b) * scaling).to(x.dtype)


@_lora_linear
def scaled_first(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """Scaling multiplies x @ lora_a^T."""
    return F.linear(x, weight, bias) + _linear(_linear(x, a) * scaling, b)


@_lora_linear
def of_the_merged_weight(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """One product, in float32 and rounded once, with the merged weight."""
    merged = weight.float() + scaling * b.float() @ a.float()
    return F.linear(x.float(), merged, None if bias is None else bias.float()).to(x.dtype)


@_lora_linear
def side_by_side(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """One product of [x, x @ lora_a^T] with [weight, lora_b]."""
    both = torch.cat((weight.to(b.dtype), scaling * b), 1)
    return _linear(torch.cat((x, _linear(x, a)), -1), both, None if bias is None else bias.to(b.dtype))


@_lora_linear
def in_float64(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """More exact than required."""
    wide = [t.double() for t in (x, weight, a, b)]
    return reference.lora_linear(*wide, scaling, None if bias is None else bias.double()).to(x.dtype)


TABLE = {
    "of_peft": of_peft,
    "scaled_first": scaled_first,
    "of_the_merged_weight": of_the_merged_weight,
    "side_by_side": side_by_side,
    "in_float64": in_float64,
}

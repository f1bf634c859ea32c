"""Right linear layers in float8."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import Function
from tests.judge.right import fp8_quantize
from unsloth_ref import float8_checks
from unsloth_ref import kernels as reference


def _straight(x: Tensor, other: Tensor) -> Tensor:
    """Another tensor with the derivative of x, by PyTorch's own nodes: plain PyTorch may save what it needs."""
    return other + (x - x.detach())


def _fp8_linear(product: Function, quantize: Function = reference.fp8_quantize) -> Function:
    """Complete a product with the numbers of x and their scales to the contract."""

    def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        float8_checks.linear_arguments(x, weight, scale, bias)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            y = product(rows, *quantize(rows.float(), 1), weight, scale, bias)
        return y.reshape(*x.shape[:-1], len(weight))

    return fp8_linear


def rounded(x: Tensor, values: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Round x and the weight to the dtype of x after they are dequantised."""
    straight = _straight(x, reference.fp8_dequantize(values, x_scale, x.dtype))
    return F.linear(straight, reference.fp8_dequantize(weight, scale, x.dtype), bias)


def in_float64(
    x: Tensor, values: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """More exact than required; the bias is added to the rounded product."""
    straight = _straight(x.double(), reference.fp8_dequantize(values, x_scale, torch.float64))
    y = F.linear(straight, reference.fp8_dequantize(weight, scale, torch.float64)).to(x.dtype)
    return y if bias is None else y + bias


def column_by_column(
    x: Tensor, values: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Add up one product per 128 columns."""
    y = x[:, :0].float().sum(1, keepdim=True) + x.new_zeros(len(weight), dtype=torch.float32)
    of_rows = torch.arange(len(weight), device=x.device) // 128
    for place in range(scale.shape[1]):
        block = slice(place * 128, (place + 1) * 128)
        left = _straight(x[:, block].float(), values[:, block].float() * x_scale[:, place, None])
        y = y + left @ weight[:, block].float().t() * scale[of_rows, place]
    return (y if bias is None else y + bias.float()).to(x.dtype)


TABLE = {
    "rounded": _fp8_linear(rounded),
    "rounded_by_a_reciprocal": _fp8_linear(rounded, fp8_quantize.by_a_reciprocal),
    "in_float64": _fp8_linear(in_float64),
    "column_by_column": _fp8_linear(column_by_column),
    "in_other_tiles": (("height = BLOCK if whole else 32", "height = BLOCK if whole else 64"),),
}

"""A linear layer with a low-rank adapter.

    y = x @ weight^T + bias + scaling * (x @ lora_a^T) @ lora_b^T

Source: Hu et al. 2021, arXiv:2106.09685. Rounding, as between modules: the layer's output, x @ lora_a^T, its product
with lora_b, that product times scaling, and the sum are each rounded to the dtype of x. Adapters of another dtype, such
as float32 master weights of a bfloat16 layer, are first rounded to the dtype of x; their gradients are not.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from unsloth_ref import adapter_checks
from unsloth_ref.kernels.fp8_linear import fp8_linear
from unsloth_ref.kernels.nf4_dequantize import nf4_dequantize
from unsloth_ref.types import Float8Weight, NF4Weight, QuantisedWeight


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantisedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer and its adapter. Autocast has no effect.

    Args:
        x: [..., I], any float dtype.
        weight: [O, I], in the dtype of x; or in 4 bits, then it is dequantised in both passes, to the dtype of x; or
            in float8, then the layer is fp8_linear, and the adapter's x is not quantised. The last two have no
            gradient.
        lora_a: [R, I], in the dtype of x or a wider one.
        lora_b: [O, R], in the dtype of lora_a.
        scaling: factor of the adapter's output.
        bias: [O], in the dtype of x; None for none.

    Returns:
        [..., O] in x.dtype.

    Raises:
        ValueError: shapes or devices do not match.
        TypeError: x does not have a float dtype, weight or bias differs from it in dtype, or an adapter is narrower.
    """
    adapter_checks.lora_arguments(x, weight, lora_a, lora_b, bias)
    x = x.contiguous()  # BLAS libraries may take strides of 32 bits only
    with torch.autocast(x.device.type, enabled=False):
        low = _linear(x, lora_a)
        if isinstance(weight, NF4Weight):
            layer = checkpoint(_nf4_linear, x, weight, bias, use_reentrant=False, preserve_rng_state=False)
        elif isinstance(weight, Float8Weight):
            layer = fp8_linear(x, *weight, bias)
        else:
            layer = linear(x, weight, bias)
        return layer + scaling * _linear(low, lora_b)


def _nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """The layer; called again in the backward pass, so that the dequantised weight is not kept."""
    return linear(x, nf4_dequantize(*weight[:5], shape=weight.shape, dtype=x.dtype), bias)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer in the dtype of x, with the weight's gradient in that of the weight.

    Converting the weight to the dtype of x would round its gradient too.
    """
    if weight.dtype == x.dtype:
        return linear(x, weight)
    rounded = weight + (weight.to(x.dtype).to(weight.dtype) - weight).detach()
    return linear(x.to(weight.dtype), rounded).to(x.dtype)

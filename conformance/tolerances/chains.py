"""Operators of PyTorch that are chains of simpler ones, and those chains: roundings happen inside."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from conformance.tolerances.sums import name_of

# Chains of simpler operators, in which numbers may cancel.
COMPOSITE = {
    "gelu", "gelu_backward", "silu", "silu_backward", "_softmax", "_log_softmax", "_softmax_backward_data",
    "_log_softmax_backward_data", "native_layer_norm", "native_layer_norm_backward", "native_group_norm",
    "native_group_norm_backward", "native_batch_norm", "native_batch_norm_backward", "_fused_rms_norm",
    "_fused_rms_norm_backward", "softplus", "softplus_backward", "var", "var_mean", "std", "std_mean", "logsumexp",
    "mish", "mish_backward", "elu", "elu_backward", "smooth_l1_loss", "huber_loss", "mse_loss", "mse_loss_backward",
    "log_sigmoid_forward", "log_sigmoid_backward", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "soft_margin_loss", "addmm", "addmv", "baddbmm", "addcmul", "addcdiv", "lerp",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "hardswish", "glu", "glu_backward", "sigmoid_backward",
    "tanh_backward", "logaddexp", "rsub", "dist", "norm", "trace", "nansum", "nll_loss_forward", "nll_loss2d_forward",
    "multi_margin_loss", "_adaptive_avg_pool2d", "_euclidean_dist",
}  # fmt: skip

# Operators that compute weights from places, which no probe disturbs.
INSIDE = {
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_trilinear3d_backward",
    "upsample_bicubic2d_backward", "grid_sampler_2d", "grid_sampler_2d_backward", "grid_sampler_3d",
    "grid_sampler_3d_backward",
}  # fmt: skip


def chain_of(func: Any) -> Callable[..., Any] | None:
    """The simpler operators that an operator of COMPOSITE consists of, as a function; None if torch has none."""
    if func is torch.ops.prims.var.default:  # torch takes no variance apart further
        return _variance
    return decomposition_table.get(func) if name_of(func) in COMPOSITE else None


def _variance(numbers: Tensor, dims: list[int], correction: float = 1.0, **_: Any) -> Tensor:
    """The variance over some dimensions, as the mean square of differences from the mean."""
    differences = numbers - numbers.mean(dims, keepdim=True)
    freedom = prod(numbers.shape[dim] for dim in dims) - correction
    return differences.square().sum(dims) / max(0.0, freedom)

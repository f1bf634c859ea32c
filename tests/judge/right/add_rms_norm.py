"""Right additions with an RMS norm."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import Function
from tests.judge.right.rms_norm import BACKWARD_TILES, sums_in_two_levels
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def _add_rms_norm(normalise: Function) -> Function:
    """Complete a norm in float32 of the sum to the contract: checks, the offset, the roundings of casting."""

    def add_rms_norm(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        casting: str = "llama",
    ) -> tuple[Tensor, Tensor]:
        checks.norm_arguments(x, weight, eps)
        checks.same("residual", residual, "x", x)
        checks.one_of("casting", casting, ("llama", "gemma"))
        total = x + residual
        normed = normalise(x, residual, total, eps)
        if casting == "llama":
            normed = normed.to(x.dtype).float()
        return (normed * (weight.float() + offset)).to(x.dtype), total

    return add_rms_norm


@_add_rms_norm
def of_torch(x: Tensor, residual: Tensor, total: Tensor, eps: float) -> Tensor:
    """torch's own operator; the gradients of both outputs are added in the dtype of x."""
    return F.rms_norm(total.float(), total.shape[-1:], None, eps)


@_add_rms_norm
def in_two_levels(x: Tensor, residual: Tensor, total: Tensor, eps: float) -> Tensor:
    """Another order of summation."""
    wide = total.float()
    return wide / torch.sqrt(sums_in_two_levels(wide.square()) / max(x.shape[-1], 1) + eps)


@_add_rms_norm
def of_the_exact_sum(x: Tensor, residual: Tensor, total: Tensor, eps: float) -> Tensor:
    """The sum is normalised before it is rounded."""
    wide = x.float() + residual.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def in_float64(x: Tensor, residual: Tensor, weight: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """More exact than required."""
    checks.norm_arguments(x, weight, 0.0)
    checks.same("residual", residual, "x", x)
    normed, total = reference.add_rms_norm(x.double(), residual.double(), weight.double(), *others, **options)
    return normed.to(x.dtype), total.to(x.dtype)


TABLE = {
    "of_torch": of_torch,
    "in_two_levels": in_two_levels,
    "of_the_exact_sum": of_the_exact_sum,
    "in_float64": in_float64,
    "in_other_tiles": (
        ("elements=2048, widest=16384, per_thread=32 if", "elements=8192, widest=8192, per_thread=8 if"),
        *BACKWARD_TILES,
    ),
}

"""Right layer norms."""

import torch
from torch import Tensor

from tests.judge import world
from tests.judge.right.rms_norm import BACKWARD_TILES, sums_in_two_levels
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def in_two_levels(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Another order of summation, and the mean of g times the deviation instead of a gradient through the mean."""
    checks.norm_arguments(x, weight, eps)
    checks.column_vector("bias", bias, "x", x)
    wide, columns = x.float(), max(x.shape[-1], 1)
    centred = wide - sums_in_two_levels(wide) / columns
    normed = centred / torch.sqrt(sums_in_two_levels(centred.square()) / columns + eps)
    return (normed * weight.float() + bias.float()).to(x.dtype)


def of_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """torch's own operator, which autocast on a GPU would widen."""
    with torch.autocast(x.device.type, enabled=False):
        return world.torch_layer_norm(x, weight, bias, eps)


def in_float64(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """More exact than required."""
    checks.norm_arguments(x, weight, eps)
    return reference.layer_norm(x.double(), weight.double(), bias.double(), eps).to(x.dtype)


TABLE = {
    "of_torch": of_torch,
    "in_two_levels": in_two_levels,
    "in_float64": in_float64,
    "in_other_tiles": (
        ("512 if columns <= 3072 else 1024 if columns <= 6144 else 2048", "64 if columns <= 96 else 1024"),
        ("max(1, 2048 // width), min(width, widest), widest // 256)", "max(1, 512 // width), min(width, widest), 4)"),
        ("parts <= 8", "parts <= 3"),
        *BACKWARD_TILES,
    ),
}

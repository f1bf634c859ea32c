"""Right RMS norms."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge import world
from tests.judge.contract import compiled
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def sums_in_two_levels(values: Tensor) -> Tensor:
    """Sums of 64 columns each, then the sum of these."""
    padded = F.pad(values, (0, -values.shape[-1] % 64))
    return padded.unflatten(-1, (-1, 64)).sum(-1).sum(-1, keepdim=True)


def in_two_levels(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """Another order of summation."""
    checks.norm_arguments(x, weight, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    wide = x.float()
    normed = wide / torch.sqrt(sums_in_two_levels(wide.square()) / max(x.shape[-1], 1) + eps)
    if casting == "llama":
        normed = normed.to(x.dtype).float()
    return (normed * (weight.float() + offset)).to(x.dtype)


def in_float64(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
    """More exact than required."""
    checks.dtype("x", x)
    return reference.rms_norm(x.double(), weight.double(), *others, **options).to(x.dtype)


# So that a program sums several tiles, and even short rows have several parts.
BACKWARD_TILES = (
    ("columns <= 2048:\n        width = next_power_of_2(columns)", "columns <= 16:\n        width = 16"),
    ("2048 // width, width, 1, 4, 384", "4, width, 1, 4, 3"),
    ("width = 1024 if columns <= 5120 else 2048 if", "width = 32 if columns <= 256 else 2048 if"),
    ("programs = 384 if columns <= 3072 else 256 if columns <= 5120 else 128", "programs = 3"),
    ("cdiv(columns, width), width // 256, programs", "cdiv(columns, width), 4, programs"),
)

TABLE = {
    "of_llama": world.llama.rms_norm,
    "of_qwen3": world.qwen3.rms_norm,
    "of_torch": world.torch_operators.rms_norm,
    "in_two_levels": in_two_levels,
    "in_float64": in_float64,
    "compiled": compiled(world.llama.rms_norm),
    "in_other_tiles": (
        ("elements=2048, widest=16384, per_thread=16 if", "elements=8192, widest=8192, per_thread=8 if"),
        *BACKWARD_TILES,
    ),
}

"""Right norms with a gate."""

from typing import Any

import torch
from torch import Tensor

from tests.judge import world
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def in_float32(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, group_size: int | None = None,
    norm_before_gate: bool = True, casting: str = "llama",
) -> Tensor:  # fmt: skip
    """Rounded once, with a division by the root mean square, and by an exponential."""
    checks.gated_norm_arguments(x, gate, weight, eps, group_size)
    checks.one_of("casting", casting, ("llama", "gemma"))
    wide = gate.float()
    activation = wide * torch.exp(wide.clamp(max=0.0)) / (1 + torch.exp(-wide.abs()))  # neither is infinite
    rows = x.float() if norm_before_gate else x.float() * activation
    groups = rows.unflatten(-1, (-1, group_size or max(1, x.shape[-1])))
    normed = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight.float()
    return (normed * activation if norm_before_gate else normed).to(x.dtype)


def in_float64(x: Tensor, gate: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
    """More exact than required."""
    checks.same("gate", gate, "x", x)
    return reference.gated_rms_norm(x.double(), gate.double(), weight.double(), *others, **options).to(x.dtype)


# So that a program sums several tiles, and short groups are read in parts.
TILES = (
    ("WIDEST = 8192", "WIDEST = 512"),
    ("BackwardTile(1, 4096, 0, 8, 256)", "BackwardTile(1, 256, 0, 4, 3)"),
    (
        "BackwardTile(max(1, 1024 // width), width, 1, warps, max(128, 2048 // warps))",
        "BackwardTile(4, width, 1, 4, 3)",
    ),
)

TABLE = {
    "of_transformers": world.gated.gated_rms_norm,
    "in_float32": in_float32,
    "in_float64": in_float64,
    "in_other_tiles": TILES,
}

"""Right gated activations of one tensor."""

from typing import Any

import torch
from torch import Tensor

from tests.judge import world
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def in_float32(
    gate_up: Tensor, *, interleaved: bool = False, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0
) -> Tensor:
    """Rounded once; up is multiplied first."""
    checks.fused_gated_arguments(gate_up, alpha, limit, offset)
    wide = gate_up.float()
    pairs = wide.unflatten(-1, (-1, 2)) if interleaved else wide.unflatten(-1, (2, -1)).transpose(-2, -1)
    gate, up = pairs.unbind(-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + offset) * gate * torch.sigmoid(alpha * gate)).to(gate_up.dtype)


def in_float64(gate_up: Tensor, **options: Any) -> Tensor:
    """More exact than required."""
    checks.dtype("gate_up", gate_up)
    return reference.fused_swiglu(gate_up.double(), **options).to(gate_up.dtype)


TABLE = {
    "of_phi3_and_gpt_oss": world.gpt_oss.fused_swiglu,
    "in_float32": in_float32,
    "in_float64": in_float64,
    "in_other_tiles": (("TILE = 1024", "TILE = 256"),),
}

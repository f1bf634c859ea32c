"""Right gated activations with GELU."""

import math
from typing import Literal

import torch
from torch import Tensor

from unsloth_ref import checks
from unsloth_ref import kernels as reference


def by_erfc(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """Without cancellation, in float32, rounded once."""
    checks.gated_arguments(gate, up)
    checks.one_of("approximate", approximate, ("none", "tanh"))
    wide = gate.float()
    twice = 2 * math.sqrt(2 / math.pi) * wide * (1 + 0.044715 * wide * wide)
    share = torch.sigmoid(twice) if approximate == "tanh" else torch.special.erfc(-wide / math.sqrt(2)) / 2
    return (wide * share * up.float()).to(gate.dtype)


def by_erf(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """The formulas as written, with their cancellation; up is multiplied first."""
    checks.gated_arguments(gate, up)
    checks.one_of("approximate", approximate, ("none", "tanh"))
    wide = gate.float()
    z = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    odd = torch.tanh(z) if approximate == "tanh" else torch.erf(wide / math.sqrt(2))
    return (0.5 * wide * up.float() * (1 + odd)).to(gate.dtype)


def in_float64(gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """More exact than required."""
    checks.gated_arguments(gate, up)
    return reference.geglu(gate.double(), up.double(), approximate=approximate).to(gate.dtype)


TABLE = {
    "by_erfc": by_erfc,
    "by_erf": by_erf,
    "in_float64": in_float64,
    "in_other_tiles": (("TILE = 1024", "TILE = 4096"),),
}

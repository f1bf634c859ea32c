"""Right gated activations with SiLU."""

import torch
from torch import Tensor

from tests.judge import world
from tests.judge.contract import compiled
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def by_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    """In float32, rounded once."""
    checks.gated_arguments(gate, up)
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)


def by_exp(gate: Tensor, up: Tensor) -> Tensor:
    """A quotient of exponentials that cannot overflow; gate is first multiplied by up."""
    checks.gated_arguments(gate, up)
    wide = gate.float()
    small = torch.exp(-wide.abs())
    return (wide * up.float() * torch.where(wide < 0, small, 1.0) / (1 + small)).to(gate.dtype)


def in_float64(gate: Tensor, up: Tensor) -> Tensor:
    """More exact than required."""
    checks.gated_arguments(gate, up)
    return reference.swiglu(gate.double(), up.double()).to(gate.dtype)


TABLE = {
    "of_llama": world.llama.swiglu,
    "by_sigmoid": by_sigmoid,
    "by_exp": by_exp,
    "in_float64": in_float64,
    "compiled": compiled(by_sigmoid),
    "in_other_tiles": (("TILE = 1024", "TILE = 8192"),),
}

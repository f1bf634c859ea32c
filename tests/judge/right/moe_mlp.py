"""Right MLPs of experts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import Function
from unsloth_ref import expert_checks
from unsloth_ref import kernels as reference


def _moe_mlp(mlp: Function) -> Function:
    """Complete the output of each slot to the contract: checks, and no effect of autocast."""

    def moe_mlp(
        x: Tensor, gate_up: Tensor, down: Tensor, expert_indices: Tensor, expert_weights: Tensor, *,
        activation: str = "silu",
    ) -> Tensor:  # fmt: skip
        expert_checks.expert_arguments(x, gate_up, down, expert_indices, expert_weights, activation)
        if not torch.compiler.is_compiling():
            expert_checks.experts_exist(expert_indices, len(gate_up))
        with torch.autocast(x.device.type, enabled=False):
            z = torch.einsum("th,tkfh->tkf", x.float(), _of_slots(gate_up, expert_indices)).to(x.dtype)
            gate, up = z.chunk(2, -1)
            a = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
            return mlp(a, up, _of_slots(down, expert_indices), expert_weights[..., None]).to(x.dtype)

    return moe_mlp


def _of_slots(matrices: Tensor, expert_indices: Tensor) -> Tensor:
    """The matrix of each slot in float32; indexing by a transposed tensor has other strides than a trace predicts."""
    return matrices.float().index_select(0, expert_indices.flatten()).unflatten(0, expert_indices.shape)


def _product(hidden: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("tkf,tkhf->tkh", hidden.float(), down)


@_moe_mlp
def weighted_before_the_last_product(a: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
    """The weight multiplies h."""
    return _product((a * up * weights).to(a.dtype), down).to(a.dtype).sum(1)


@_moe_mlp
def weighted_after_the_last_product(a: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
    """As the reference, with a copy of its matrices for each slot."""
    return (_product(a * up, down).to(a.dtype) * weights).sum(1)


@_moe_mlp
def rounded_once(a: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
    """Everything behind the activation is float32."""
    return (_product(a.float() * up.float(), down) * weights.float()).sum(1)


def in_float64(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_indices: Tensor, expert_weights: Tensor, *,
    activation: str = "silu",
) -> Tensor:  # fmt: skip
    """More exact than required."""
    expert_checks.expert_arguments(x, gate_up, down, expert_indices, expert_weights, activation)
    wide = [tensor.double() for tensor in (x, gate_up, down)]
    y = reference.moe_mlp(*wide, expert_indices, expert_weights.double(), activation=activation)  # type: ignore[arg-type]
    return y.to(x.dtype)


TABLE = {
    "weighted_before_the_last_product": weighted_before_the_last_product,
    "weighted_after_the_last_product": weighted_after_the_last_product,
    "rounded_once": rounded_once,
    "in_float64": in_float64,
    "in_other_tiles": (
        ("return 64 if dtype == torch.float32 else 128", "return 16 if dtype == torch.float32 else 32"),
        ("SLOTS = 2048", "SLOTS = 64"),
    ),
}

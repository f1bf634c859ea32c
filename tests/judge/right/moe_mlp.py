"""Right MLPs of experts."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import Function
from unsloth_ref import checks, expert_checks
from unsloth_ref import kernels as reference


def _moe_mlp(mlp: Function) -> Function:
    """Complete the output of each slot to the contract: checks, and no effect of autocast."""

    def moe_mlp(
        x: Tensor, gate_up: Tensor, down: Tensor, expert_indices: Tensor, expert_weights: Tensor,
        gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, *, activation: str = "silu",
        interleaved: bool = False, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0,
    ) -> Tensor:  # fmt: skip
        expert_checks.expert_arguments(x, gate_up, down, expert_indices, expert_weights, gate_up_bias, down_bias)
        expert_checks.expert_gate(activation, alpha, limit, offset)
        if checks.values_are_checked(expert_indices):
            expert_checks.experts_exist(expert_indices, len(gate_up))
        with torch.autocast(x.device.type, enabled=False):
            z = torch.einsum("th,tkfh->tkf", x.float(), _of_slots(gate_up, expert_indices))
            if gate_up_bias is not None:
                z = z + _of_slots(gate_up_bias, expert_indices)
            a, up = _factors(z.to(x.dtype), activation, interleaved, alpha, limit)
            bias = None if down_bias is None else _of_slots(down_bias, expert_indices)
            weights = expert_weights[..., None]
            return mlp(a, up + offset, _of_slots(down, expert_indices), bias, weights).to(x.dtype)

    return moe_mlp


def _factors(z: Tensor, activation: str, interleaved: bool, alpha: float, limit: float | None) -> tuple[Tensor, Tensor]:
    """The activation of the gate, and up without the offset."""
    gate, up = z.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else z.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "silu":
        return gate * torch.sigmoid(alpha * gate.float()).to(z.dtype) if alpha != 1.0 else F.silu(gate), up
    return F.gelu(gate, approximate="tanh"), up


def _plus(out: Tensor, bias: Tensor | None, weights: Tensor | float = 1.0) -> Tensor:
    return out if bias is None else out + bias * weights


def _of_slots(matrices: Tensor, expert_indices: Tensor) -> Tensor:
    """The matrix of each slot in float32.

    Indexing by a transposed tensor has other strides than a trace predicts. The gradient of index_select is a sum in
    any order on a GPU.
    """
    return matrices.float()[expert_indices.flatten()].unflatten(0, expert_indices.shape)


def _product(hidden: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("tkf,tkhf->tkh", hidden.float(), down)


@_moe_mlp
def weighted_before_the_last_product(
    a: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, weights: Tensor
) -> Tensor:
    """The weight multiplies h."""
    return _plus(_product((a * up * weights).to(a.dtype), down), bias, weights).to(a.dtype).sum(1)


@_moe_mlp
def weighted_after_the_last_product(
    a: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, weights: Tensor
) -> Tensor:
    """As the reference, with a copy of its matrices for each slot."""
    return (_plus(_product(a * up, down), bias).to(a.dtype) * weights).sum(1)


@_moe_mlp
def rounded_once(a: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, weights: Tensor) -> Tensor:
    """Everything behind the activation is float32."""
    return (_plus(_product(a.float() * up.float(), down), bias) * weights.float()).sum(1)


def in_float64(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_indices: Tensor, expert_weights: Tensor,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """More exact than required."""
    expert_checks.expert_arguments(x, gate_up, down, expert_indices, expert_weights, gate_up_bias, down_bias)
    wide = [None if tensor is None else tensor.double() for tensor in (expert_weights, gate_up_bias, down_bias)]
    return reference.moe_mlp(x.double(), gate_up.double(), down.double(), expert_indices, *wide, **options).to(x.dtype)


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

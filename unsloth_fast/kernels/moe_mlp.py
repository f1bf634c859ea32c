"""The MLPs of a mixture of experts: each token goes through some of them, and their outputs are added with weights.

    z_ts = x_t @ gate_up_e^T, e = expert_indices[t, s]; its halves are gate and up
    h_ts = a(gate_ts) * up_ts          out_ts = h_ts @ down_e^T         y_t = sum over s of w_ts * out_ts
    dh_ts = dy_t @ down_e              dw_ts = dh_ts . h_ts
    dgate_ts = w_ts * dh_ts * up_ts * a'(gate_ts)        dup_ts = w_ts * dh_ts * a(gate_ts)
    dx_t = sum over s of dz_ts @ gate_up_e
    dgate_up_e = sum of dz_ts^T @ x_t, ddown_e = sum of dy_t^T @ (w_ts h_ts), over the slots (t, s) of expert e

Slots are sorted by expert on the device; each program of the sort counts for one expert, so that no atomics are needed
and the host does not wait. Products read the rows of x and dy by their tokens: no tensor of k rows per token of x or dy
is made. A token's sums over its slots are in their order. `_grouped.py` and `_moe_mlp.py` have the kernels.

Saved: x, gate_up, down, expert_weights, z [Tk, 2F], and the order of slots. h is computed again, and as the weight
multiplies h, out is not needed for dw. Sums are float32; z, h, out, dh, dz, the weighted h and the parts of dx are
rounded to the dtype of x.
Operations: 6TkFH forward, 6TkFH backward and as many again for both weights.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._gated import ACTIVATIONS, gated_forward
from unsloth_fast.kernels._grouped import Slots, grouped_product, grouped_weight, new_plan
from unsloth_fast.kernels._launch import check_runnable, register
from unsloth_fast.kernels._moe_mlp import activation_backward, combined, route
from unsloth_fast.kernels._replay import call, call_recorded
from unsloth_ref import checks, expert_checks
from unsloth_ref.types import ExpertActivation


def moe_mlp_forward(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute y and z, and sort the slots: their order, their places in it, and the plan of their groups."""
    order, place, plan = route(indices, len(gate_up), x.dtype)
    z = grouped_product(x, gate_up, plan, Slots(order, indices.shape[1]))
    inner = down.shape[2]
    hidden = gated_forward(z[:, :inner], z[:, inner:], ACTIVATIONS[activation])
    y = combined(grouped_product(hidden, down, plan), place, weights, weighted=True)
    return y, z, order, place, plan


def moe_mlp_backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, z: Tensor, order: Tensor, place: Tensor,
    plan: Tensor, activation: str, need_x: bool, need_gate_up: bool, need_down: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of x, gate_up, down and the weights; those that are not needed have no elements."""
    slots, need_dz = Slots(order, weights.shape[1]), need_x or need_gate_up
    dhidden = grouped_product(dy, down.mT, plan, slots)
    dz, hidden, dweights = activation_backward(
        z, dhidden, weights, order, ACTIVATIONS[activation], need_dz, need_down, need_weights
    )
    del dhidden
    ddown = grouped_weight(dy, hidden, plan, len(down), slots, of_dy=True) if need_down else down.new_empty(0)
    del hidden
    dgate_up = grouped_weight(dz, x, plan, len(down), slots) if need_gate_up else gate_up.new_empty(0)
    dx = combined(grouped_product(dz, gate_up.mT, plan), place, weights, weighted=False) if need_x else x.new_empty(0)
    return dx, dgate_up, ddown, dweights


def moe_mlp_forward_outputs(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results."""
    slots = indices.shape[0] * indices.shape[1]
    order, place = (indices.new_empty(slots, dtype=torch.int32) for _ in range(2))
    plan = new_plan(indices, gate_up.shape[0], slots, x.dtype)
    return x.new_empty(x.shape), x.new_empty(slots, gate_up.shape[1]), order, place, plan


def moe_mlp_backward_outputs(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, z: Tensor, order: Tensor, place: Tensor,
    plan: Tensor, activation: str, need_x: bool, need_gate_up: bool, need_down: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate all gradients."""
    return (
        x.new_empty(x.shape if need_x else 0),
        gate_up.new_empty(gate_up.shape if need_gate_up else 0),
        down.new_empty(down.shape if need_down else 0),
        weights.new_empty(weights.shape if need_weights else 0),
    )


forward_op = register(
    "moe_mlp_forward(Tensor x, Tensor gate_up, Tensor down, Tensor indices, Tensor weights, str activation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_mlp_forward,
    moe_mlp_forward_outputs,
)
backward_op = register(
    "moe_mlp_backward(Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor z, Tensor order,"
    " Tensor place, Tensor plan, str activation, bool need_x, bool need_gate_up, bool need_down, bool need_weights)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    moe_mlp_backward,
    moe_mlp_backward_outputs,
)


class _MoeMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, activation: str
    ) -> Tensor:
        y, *sorted_slots = forward_op(x, gate_up, down, indices, weights, activation)
        ctx.save_for_backward(x, gate_up, down, weights, *sorted_slots)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, *saved: Tensor) -> Gradients:
        needs = [ctx.needs_input_grad[index] for index in (0, 1, 2, 4)]
        gradients = backward_op(dy, *saved, ctx.activation, *needs)
        dx, dgate_up, ddown, dweights = (one if need else None for one, need in zip(gradients, needs, strict=True))
        return dx, dgate_up, ddown, None, dweights, None


def check(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, activation: str) -> None:
    """Raise for arguments that moe_mlp does not allow."""
    expert_checks.expert_arguments(x, gate_up, down, indices, weights, activation)
    if checks.values_are_checked(indices):
        expert_checks.experts_exist(indices, len(gate_up))
    check_runnable("x", x)
    check_runnable("expert_weights", weights)


def moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    *,
    activation: ExpertActivation = "silu",
) -> Tensor:
    """Send each token through its experts' gated MLPs and add up their weighted outputs. Autocast has no effect.

    A slot is a pair of a token and one of its experts. An expert that occurs twice in a token counts twice. An expert
    without tokens gets gradients of 0.

    Args:
        x: [T, H], float16, bfloat16 or float32.
        gate_up: [E, 2F, H], as x; E at least 1. The first F rows of an expert make its gate.
        down: [E, H, F], as x.
        expert_indices: [T, k], int32 or int64, from 0 to E - 1.
        expert_weights: [T, k], in the dtype of x, or float32.
        activation: "silu" or "gelu_tanh".

    Returns:
        [T, H] in x.dtype, contiguous.

    Raises:
        ValueError: shapes or devices do not match, activation is unknown, or, on a CPU, an index is not from 0 to
            E - 1. On CUDA and in compiled code, a slot without an expert adds nothing and gets a gradient of 0 instead;
            UNSLOTH_DEBUG=1 makes CUDA raise too.
        TypeError: x does not have a float dtype or is float64, gate_up or down differs from it in dtype, expert_weights
            is narrower or float64, or expert_indices are no integers.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Shazeer 2017, arXiv:1701.06538; Mixtral, Jiang 2024, arXiv:2401.04088.
    """
    run = call if checks.values_are_checked(expert_indices) else call_recorded
    return run(_MoeMlp, check, x, gate_up, down, expert_indices, expert_weights, activation)

"""The MLPs of a mixture of experts: each token goes through some of them, and their outputs are added with weights.

    z_ts = x_t @ gate_up_e^T + gate_up_bias_e, e = expert_indices[t, s]; gate, up: its halves, or even and odd columns
    h_ts = a(gate_ts) * up_ts      out_ts = h_ts @ down_e^T + down_bias_e      y_t = sum over s of w_ts * out_ts
    dh_ts = dy_t @ down_e          dw_ts = dh_ts . h_ts + dy_t . down_bias_e
    dgate_ts = w_ts * dh_ts * up_ts * a'(gate_ts)        dup_ts = w_ts * dh_ts * a(gate_ts)
    dx_t = sum over s of dz_ts @ gate_up_e
    dgate_up_e = sum of dz_ts^T @ x_t, ddown_e = sum of dy_t^T @ (w_ts h_ts), over the slots (t, s) of expert e
    dgate_up_bias_e = sum of dz_ts, ddown_bias_e = sum of w_ts dy_t, over the same

fused_swiglu.py has the clamped form of a(gate) * up. Slots are sorted by expert on the device; each program of the sort
counts for one expert, so that no atomics are needed and the host does not wait. Products read the rows of x and dy by
their tokens: no tensor of k rows per token of x or dy is made. A token's sums over its slots are in their order.
`_grouped.py` and `_moe_mlp.py` have the kernels.

Saved: x, gate_up, down, down_bias, the indices and weights, z [Tk, 2F], and the order of slots. h is computed again,
and as the weight multiplies h, out is not needed for dw. Sums are float32; z, h, out, dh, dz, the weighted h and the
parts of dx are rounded to the dtype of x.
Operations: 6TkFH forward, 6TkFH backward and as many again for both weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._grouped import Slots, grouped_product, grouped_sum, grouped_weight, new_plan
from unsloth_fast.kernels._launch import check_runnable, register
from unsloth_fast.kernels._moe_mlp import Gate, activation_backward, combined, route, times_bias
from unsloth_fast.kernels._replay import call, call_recorded
from unsloth_fast.kernels.fused_swiglu import fused_gated_forward
from unsloth_ref import checks, expert_checks
from unsloth_ref.types import ExpertActivation


def moe_mlp_forward(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, *gate: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute y and z, and sort the slots: their order, their places in it, and the plan of their groups."""
    order, place, plan = route(indices, len(gate_up), x.dtype)
    z = grouped_product(x, gate_up, plan, Slots(order, indices.shape[1]), gate_up_bias)
    out = grouped_product(fused_gated_forward(z, *gate), down, plan, bias=down_bias)
    return combined(out, place, weights, weighted=True), z, order, place, plan


def moe_mlp_backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, down_bias: Tensor | None, indices: Tensor, weights: Tensor,
    z: Tensor, order: Tensor, place: Tensor, plan: Tensor, needs: Sequence[bool], *gate: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of x, gate_up, down, the weights and both biases; unneeded ones have no elements."""
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, need_down_bias = needs
    slots = Slots(order, weights.shape[1])
    products = None if down_bias is None or not need_weights else times_bias(dy, down_bias, indices)
    dhidden = grouped_product(dy, down.mT, plan, slots)
    dz, hidden, dweights = activation_backward(
        z, dhidden, weights, products, order, Gate._make(gate), need_x or need_gate_up or need_gate_up_bias, need_down,
        need_weights,
    )  # fmt: skip
    del dhidden
    ddown = grouped_weight(dy, hidden, plan, len(down), slots, of_dy=True) if need_down else x.new_empty(0)
    del hidden
    dgate_up = grouped_weight(dz, x, plan, len(down), slots) if need_gate_up else x.new_empty(0)
    dx = combined(grouped_product(dz, gate_up.mT, plan), place, weights, weighted=False) if need_x else x.new_empty(0)
    dgate_up_bias = grouped_sum(dz, plan, len(down)) if need_gate_up_bias else x.new_empty(0)
    ddown_bias = grouped_sum(dy, plan, len(down), slots, weights) if need_down_bias else x.new_empty(0)
    return dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias


def moe_mlp_forward_outputs(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, *gate: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate y, z, order, place and plan."""
    slots = indices.shape[0] * indices.shape[1]
    order, place = (indices.new_empty(slots, dtype=torch.int32) for _ in range(2))
    plan = new_plan(indices, gate_up.shape[0], slots, x.dtype)
    return x.new_empty(x.shape), x.new_empty(slots, gate_up.shape[1]), order, place, plan


def moe_mlp_backward_outputs(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, down_bias: Tensor | None, indices: Tensor, weights: Tensor,
    z: Tensor, order: Tensor, place: Tensor, plan: Tensor, needs: Sequence[bool], *gate: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate all gradients."""
    shapes = x.shape, gate_up.shape, down.shape, weights.shape, gate_up.shape[:2], down.shape[:2]
    like = x, x, x, weights, x, x
    return tuple(one.new_empty(shape if need else 0) for one, shape, need in zip(like, shapes, needs, strict=True))


ROUTES = "Tensor indices, Tensor weights"
GATE = "str activation, bool interleaved, float alpha, float? limit, float offset"
forward_op = register(
    f"moe_mlp_forward(Tensor x, Tensor gate_up, Tensor down, {ROUTES}, Tensor? gate_up_bias, Tensor? down_bias, {GATE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_mlp_forward,
    moe_mlp_forward_outputs,
)
backward_op = register(
    f"moe_mlp_backward(Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor? down_bias, {ROUTES}, Tensor z,"
    f" Tensor order, Tensor place, Tensor plan, bool[] needs, {GATE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_mlp_backward,
    moe_mlp_backward_outputs,
)


class _MoeMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor,
        gate_up_bias: Tensor | None, down_bias: Tensor | None, *gate: Any,
    ) -> Tensor:  # fmt: skip
        y, *sorted_slots = forward_op(x, gate_up, down, indices, weights, gate_up_bias, down_bias, *gate)
        ctx.save_for_backward(x, gate_up, down, down_bias, indices, weights, *sorted_slots)
        ctx.gate = gate
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, *saved: Tensor | None) -> Gradients:
        needs = [ctx.needs_input_grad[index] for index in (0, 1, 2, 4, 5, 6)]
        gradients = backward_op(dy, *saved, needs, *ctx.gate)
        dx, dgate_up, ddown, *others = (one if need else None for one, need in zip(gradients, needs, strict=True))
        return dx, dgate_up, ddown, None, *others, *[None] * len(ctx.gate)


def check(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, interleaved: bool, alpha: float, limit: float | None, offset: float,
) -> None:  # fmt: skip
    """Raise for arguments that moe_mlp does not allow."""
    expert_checks.expert_arguments(x, gate_up, down, indices, weights, gate_up_bias, down_bias)
    expert_checks.expert_gate(activation, alpha, limit, offset)
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
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: ExpertActivation = "silu",
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """Send each token through its experts' gated MLPs and add up their weighted outputs. Autocast has no effect.

    A slot is a pair of a token and one of its experts. An expert that occurs twice in a token counts twice. An expert
    without tokens gets gradients of 0.

    Args:
        x: [T, H], float16, bfloat16 or float32.
        gate_up: [E, 2F, H], as x; E at least 1. The first F rows of an expert make its gate, unless interleaved.
        down: [E, H, F], as x.
        expert_indices: [T, k], int32 or int64, from 0 to E - 1.
        expert_weights: [T, k], in the dtype of x, or float32.
        gate_up_bias: [E, 2F], as x, in the order of the rows of gate_up; None for no bias.
        down_bias: [E, H], as x; None for no bias.
        activation: "silu" or "gelu_tanh".
        interleaved: whether the even and the odd rows of an expert make its gate and up (gpt-oss), not the halves.
        alpha: factor of the gate in the sigmoid of SiLU; not negative; 1.702 for gpt-oss; 1.0 with "gelu_tanh".
        limit: the gate is clamped to at most limit, up to [-limit, limit]; not negative; None for no limit.
        offset: added to up after the clamp; 1.0 for gpt-oss.

    Returns:
        [T, H] in x.dtype, contiguous.

    Raises:
        ValueError: shapes or devices do not match, activation is unknown, alpha or limit is negative, alpha is not 1.0
            with GELU, offset is not finite, or, on a CPU, an index is not from 0 to E - 1. On CUDA and in compiled
            code, a slot without an expert adds nothing and gets a gradient of 0 instead; UNSLOTH_DEBUG=1 makes CUDA
            raise too.
        TypeError: x does not have a float dtype or is float64, a matrix or bias differs from it in dtype,
            expert_weights is narrower or float64, or expert_indices are no integers.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Shazeer et al. 2017, arXiv:1701.06538; Mixtral, Jiang et al. 2024, arXiv:2401.04088; gpt-oss, OpenAI 2025,
    arXiv:2508.10925.
    """
    run = call if checks.values_are_checked(expert_indices) else call_recorded
    gate = activation, interleaved, alpha, limit, offset
    return run(_MoeMlp, check, x, gate_up, down, expert_indices, expert_weights, gate_up_bias, down_bias, *gate)

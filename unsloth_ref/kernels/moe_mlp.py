"""The MLPs of a mixture of experts: each token goes through some of them, and their outputs are added with weights.

    z_ts = x_t @ gate_up_e^T + gate_up_bias_e, e = expert_indices[t, s]; gate, up: its halves, or even and odd columns
    h_ts = a(gate_ts) * up_ts      out_ts = h_ts @ down_e^T + down_bias_e      y_t = sum over s of w_ts * out_ts
    dw_ts = dy_t . out_ts          dout_ts = w_ts * dy_t                       dh_ts = dout_ts @ down_e
    dgate_ts = dh_ts * up_ts * a'(gate_ts)      dup_ts = dh_ts * a(gate_ts)      dx_t = sum over s of dz_ts @ gate_up_e
    dgate_up_e = sum of dz_ts^T @ x_t, ddown_e = sum of dout_ts^T @ h_ts, over the slots (t, s) of expert e
    dgate_up_bias_e = sum of dz_ts, ddown_bias_e = sum of dout_ts, over the same

a is SiLU, or GELU in its approximation by tanh. With limit, alpha or offset, a(gate) * up is clamped as in
fused_swiglu.py. Sources: Shazeer et al. 2017, arXiv:1701.06538; Mixtral, Jiang et al. 2024, arXiv:2401.04088; the
clamped form: OpenAI 2025, arXiv:2508.10925. Rounding, as in transformers' experts with grouped products: each product,
each sum with a bias, the activation as in fused_swiglu.py, and the weighted outputs are rounded; the sum over slots is
float32 and rounded once.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from unsloth_ref import expert_checks
from unsloth_ref.kernels.grouped_gemm import grouped_gemm
from unsloth_ref.types import ExpertActivation


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
        x: [T, H], any float dtype.
        gate_up: [E, 2F, H], as x; E at least 1. The first F rows of an expert make its gate, unless interleaved.
        down: [E, H, F], as x.
        expert_indices: [T, k], int32 or int64, from 0 to E - 1.
        expert_weights: [T, k], in the dtype of x or a wider one.
        gate_up_bias: [E, 2F], as x, in the order of the rows of gate_up; None for no bias.
        down_bias: [E, H], as x; None for no bias.
        activation: "silu" or "gelu_tanh".
        interleaved: whether the even and the odd rows of an expert make its gate and up (gpt-oss), not the halves.
        alpha: factor of the gate in the sigmoid of SiLU; not negative; 1.702 for gpt-oss; 1.0 with "gelu_tanh".
        limit: the gate is clamped to at most limit, up to [-limit, limit]; not negative; None for no limit.
        offset: added to up after the clamp; 1.0 for gpt-oss.

    Returns:
        [T, H] in x.dtype.

    Raises:
        ValueError: shapes or devices do not match, activation is unknown, alpha or limit is negative, alpha is not 1.0
            with GELU, offset is not finite, or an index is not from 0 to E - 1. Compiled code does not check the last;
            a slot without an expert adds nothing.
        TypeError: x does not have a float dtype, a matrix or bias differs from it in dtype, expert_weights is narrower,
            or expert_indices are no integers.
    """
    expert_checks.expert_arguments(x, gate_up, down, expert_indices, expert_weights, gate_up_bias, down_bias)
    expert_checks.expert_gate(activation, alpha, limit, offset)
    experts, slots = len(gate_up), expert_indices.flatten()
    if not torch.compiler.is_compiling():
        expert_checks.experts_exist(expert_indices, experts)
    per_token = expert_indices.shape[1]
    slots = slots.where((slots >= 0) & (slots < experts), experts)
    order = slots.argsort(stable=True)
    sizes = (slots[:, None] == torch.arange(experts, device=x.device)).sum(0)

    def multiplied(rows: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        y = grouped_gemm(rows, matrices, sizes)
        return y if bias is None else y + grouped_gemm(rows.new_ones(len(rows), 1), bias[..., None], sizes)

    with torch.autocast(x.device.type, enabled=False):
        z = multiplied(x[:, None].expand(-1, per_token, -1).flatten(0, 1)[order], gate_up, gate_up_bias)
        gate, up = (z[:, ::2], z[:, 1::2]) if interleaved else z.chunk(2, -1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if activation == "silu":
            activated = silu(gate) if alpha == 1.0 else gate * (alpha * gate).sigmoid()
        else:
            activated = gelu(gate, approximate="tanh")
        hidden = activated * (up + offset if offset else up)
        out = multiplied(hidden, down, down_bias) * expert_weights.flatten()[order, None]
        return out[order.argsort()].unflatten(0, (len(x), per_token)).sum(1).to(x.dtype)

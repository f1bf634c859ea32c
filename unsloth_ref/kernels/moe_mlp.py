"""The MLPs of a mixture of experts: each token goes through some of them, and their outputs are added with weights.

    z_ts = x_t @ gate_up_e^T, e = expert_indices[t, s]; its halves are gate and up
    h_ts = a(gate_ts) * up_ts          out_ts = h_ts @ down_e^T         y_t = sum over s of w_ts * out_ts
    dw_ts = dy_t . out_ts              dout_ts = w_ts * dy_t            dh_ts = dout_ts @ down_e
    dgate_ts = dh_ts * up_ts * a'(gate_ts)      dup_ts = dh_ts * a(gate_ts)      dx_t = sum over s of dz_ts @ gate_up_e
    dgate_up_e = sum of dz_ts^T @ x_t, ddown_e = sum of dout_ts^T @ h_ts, over the slots (t, s) of expert e

a is SiLU, or GELU in its approximation by tanh. Sources: Shazeer 2017, arXiv:1701.06538; Mixtral, Jiang 2024,
arXiv:2401.04088. Rounding: as transformers' experts with grouped products, each product, the activation, and the
weighted outputs are rounded; the sum over slots is float32 and rounded once.
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
    *,
    activation: ExpertActivation = "silu",
) -> Tensor:
    """Send each token through its experts' gated MLPs and add up their weighted outputs. Autocast has no effect.

    A slot is a pair of a token and one of its experts. An expert that occurs twice in a token counts twice. An expert
    without tokens gets gradients of 0.

    Args:
        x: [T, H], any float dtype.
        gate_up: [E, 2F, H], as x; E at least 1. The first F rows of an expert make its gate.
        down: [E, H, F], as x.
        expert_indices: [T, k], int32 or int64, from 0 to E - 1.
        expert_weights: [T, k], in the dtype of x or a wider one.
        activation: "silu" or "gelu_tanh".

    Returns:
        [T, H] in x.dtype.

    Raises:
        ValueError: shapes or devices do not match, activation is unknown, or an index is not from 0 to E - 1. Compiled
            code does not check the last; a slot without an expert adds nothing.
        TypeError: x does not have a float dtype, gate_up or down differs from it in dtype, expert_weights is narrower,
            or expert_indices are no integers.
    """
    expert_checks.expert_arguments(x, gate_up, down, expert_indices, expert_weights, activation)
    experts, slots = len(gate_up), expert_indices.flatten()
    if not torch.compiler.is_compiling():
        expert_checks.experts_exist(expert_indices, experts)
    per_token = expert_indices.shape[1]
    slots = slots.where((slots >= 0) & (slots < experts), experts)
    order = slots.argsort(stable=True)
    sizes = (slots[:, None] == torch.arange(experts, device=x.device)).sum(0)
    with torch.autocast(x.device.type, enabled=False):
        rows = x[:, None].expand(-1, per_token, -1).flatten(0, 1)[order]
        gate, up = grouped_gemm(rows, gate_up, sizes).chunk(2, -1)
        hidden = (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")) * up
        out = grouped_gemm(hidden, down, sizes) * expert_weights.flatten()[order, None]
        return out[order.argsort()].unflatten(0, (len(x), per_token)).sum(1).to(x.dtype)

"""Gated activation with SiLU of a gate and an up projection in one tensor, and its clamped form.

    g = min(gate, limit)      u = max(-limit, min(up, limit))      s = 1 / (1 + exp(-alpha * g))
    y = g * s * (u + offset)
    dgate = dy * (u + offset) * s * (1 + alpha * g * (1 - s)), 0 where gate > limit
    dup = dy * g * s, 0 where |up| > limit

gate and up are the halves of the last dimension, or its even and odd columns. Without limit nothing is clamped.

Sources: Shazeer 2020, arXiv:2002.05202; the clamped form: OpenAI 2025, arXiv:2508.10925. Rounding: with alpha=1 and
offset=0 as transformers' Phi3MLP, the activation and then the product; otherwise as its GptOssExperts: alpha * g, s,
g * s and u + offset are rounded, then the product.
"""

from torch import Tensor
from torch.nn.functional import silu

from unsloth_ref import checks


def fused_swiglu(
    gate_up: Tensor,
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """Multiply the SiLU of the gate by up, element by element.

    Args:
        gate_up: [..., 2F], any float dtype.
        interleaved: whether gate and up are the even and the odd columns (gpt-oss), not the halves (Phi-3, GLM).
        alpha: factor of the gate in the sigmoid; not negative; 1.702 for gpt-oss.
        limit: the gate is clamped to at most limit, up to [-limit, limit]; not negative; None for no limit.
        offset: added to up after the clamp; 1.0 for gpt-oss.

    Returns:
        [..., F] in gate_up.dtype.

    Raises:
        ValueError: gate_up has an odd number of columns, alpha or limit is negative, or offset is not finite.
        TypeError: gate_up does not have a float dtype.
    """
    checks.fused_gated_arguments(gate_up, alpha, limit, offset)
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    activation = silu(gate) if alpha == 1.0 else gate * (alpha * gate).sigmoid()
    return activation * (up + offset if offset else up)

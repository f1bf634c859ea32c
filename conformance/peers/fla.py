"""flash-linear-attention, whose kernels are in fla-core: those that transformers calls for Qwen3-Next and Qwen 3.5."""

from typing import Any

from torch import Tensor

from conformance.peers import import_kernels, operation

_gated_delta_rule, _causal_conv, _norm_gated, _norm_of_groups = import_kernels(
    "fla-core",
    "fla.ops.gated_delta_rule:chunk_gated_delta_rule",
    "fla.modules.causal_conv1d:causal_conv1d",
    "fla.modules.norm.fused_norm_gate:rms_norm_gated",
    "fla.modules.norm.layernorm_gated:rmsnorm_fn",
)


@operation
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, *, scale: float | None = None
) -> Tensor:
    """In chunks of 64 tokens; the host reads cu_seqlens, once while it is the same tensor."""
    rows = (x[None] for x in (q, k, v, g, beta))
    return _gated_delta_rule(*rows, scale=scale, cu_seqlens=cu_seqlens)[0][0]


@operation
def causal_conv(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Any = None, *, activation: str | None = None
) -> Tensor:
    """With its default backend, Triton; the host reads cu_seqlens, once while it is the same tensor."""
    return _causal_conv(x[None], weight, bias, activation=activation, cu_seqlens=cu_seqlens)[0][0]


@operation
def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, group_size: int | None = None,
    norm_before_gate: bool = True, casting: str = "llama",
) -> Tensor:  # fmt: skip
    """As FusedRMSNormGated, or as RMSNormGated for groups and a gate before the norm; both round once."""
    if norm_before_gate and group_size in (None, x.shape[-1]):
        return _norm_gated(x, gate, weight, None, eps=eps)
    return _norm_of_groups(x, weight, None, gate, eps, group_size, norm_before_gate)

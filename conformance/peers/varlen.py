"""torch.nn.attention.varlen, flash attention over packed documents; it has no other operation."""

from inspect import signature
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from conformance.peers import operation, refuse

# Releases without this keyword accept fewer heads of k and v anyway.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@operation
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
    scale: float | None = None, window: int | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """With its defaults, which sum the gradient of q in no fixed order."""
    refuse("torch.nn.attention.varlen", options, softcap=0.0, sinks=None)
    left = -1 if window is None else window - 1
    bounds, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    out: Any = varlen_attn(q, k, v, *bounds, *longest, scale=scale, window_size=(left, 0), **_GROUPED)
    return out

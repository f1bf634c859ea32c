"""torch.nn.attention.varlen, flash attention over documents, which is packed attention alone."""

from inspect import signature
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Releases that have no such keyword take fewer heads of k and v as they are.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """With its defaults, which add up the gradient of q in any order."""
    if softcap:
        raise NotImplementedError("torch.nn.attention.varlen has no softcap")
    left = -1 if window is None else window - 1
    bounds, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    out: Any = varlen_attn(q, k, v, *bounds, *longest, scale=scale, window_size=(left, 0), **_GROUPED)
    return out

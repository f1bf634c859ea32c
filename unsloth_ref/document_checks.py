"""The contract's checks of operations on packed documents, and the document of each token; both backends call them."""

from itertools import pairwise

import torch
from torch import Tensor

from unsloth_ref import checks


def packed_attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    window: int | None,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """Check q [T, N, D], k and v [T, K, D], cu_seqlens [documents + 1] and the options of packed attention."""
    checks.dimensions("q", q, 3, "[T, N, D]")
    checks.dtype("q", q)
    checks.dimensions("k", k, 3, "[T, K, D]")
    tokens, heads, width = q.shape
    checks.shape("k", k, (tokens, k.shape[1], width), "[T, K, D] with T and D of q")
    if heads == 0 or width == 0:
        raise ValueError(f"q: got shape {list(q.shape)}; allowed: [T, N, D] with N and D at least 1")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k: got shape {list(k.shape)}; allowed: [T, K, D] with a K that divides {heads}, the N of q")
    checks.dtype("k", k, (q.dtype,))
    checks.same_device("k", k, "q", q)
    checks.same("v", v, "k", k)
    document_bounds(cu_seqlens, "q", q)
    checks.in_range("max_seqlen", max_seqlen, 0)
    checks.in_range("softcap", softcap, 0.0)
    if scale is not None:
        checks.in_range("scale", scale, 0.0)
    if window is not None:
        checks.in_range("window", window, 1)
    if sinks is not None:
        checks.dtype("sinks", sinks)
        checks.shape("sinks", sinks, (heads,), "[N], the N of q")
        checks.same_device("sinks", sinks, "q", q)


def causal_conv_arguments(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    """Check x [T, C], weight [C, W], cu_seqlens [documents + 1], bias [C] and the activation of a convolution."""
    checks.dimensions("x", x, 2, "[T, C]")
    checks.dtype("x", x)
    checks.dimensions("weight", weight, 2, "[C, W]")
    if weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        seen = list(weight.shape)
        raise ValueError(f"weight: got shape {seen}; allowed: [{x.shape[1]}, W], the C of x, W at least 1")
    checks.dtype("weight", weight)
    checks.same_device("weight", weight, "x", x)
    document_bounds(cu_seqlens, "x", x)
    if bias is not None:
        checks.column_vector("bias", bias, "x", x)
    checks.one_of("activation", activation, (None, "silu"))


def gated_delta_rule_arguments(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, scale: float | None
) -> None:
    """Check q and k [T, N, D], v [T, M, E], g and beta [T, M], cu_seqlens [documents + 1] and the scale."""
    checks.dimensions("q", q, 3, "[T, N, D]")
    checks.dtype("q", q)
    tokens, heads, width = q.shape
    if heads == 0 or width == 0:
        raise ValueError(f"q: got shape {list(q.shape)}; allowed: [T, N, D] with N and D at least 1")
    checks.same("k", k, "q", q)
    checks.dimensions("v", v, 3, "[T, M, E]")
    if v.shape[0] != tokens or v.shape[1] == 0 or v.shape[1] % heads or v.shape[2] == 0:
        seen = list(v.shape)
        raise ValueError(f"v: got shape {seen}; allowed: [{tokens}, M, E], T of q, M a multiple of {heads}, the N of q")
    checks.dtype("v", v, (q.dtype,))
    checks.same_device("v", v, "q", q)
    for name, tensor in (("g", g), ("beta", beta)):
        checks.shape(name, tensor, v.shape[:2], "T and M of v")
        checks.dtype(name, tensor)
        checks.same_device(name, tensor, "q", q)
    document_bounds(cu_seqlens, "q", q)
    if scale is not None:
        checks.in_range("scale", scale, 0.0)


def mamba2_scan_arguments(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor
) -> None:
    """Check x [T, M, E], dt [T, M], a and d [M], b and c [T, N, D], and cu_seqlens [documents + 1]."""
    checks.dimensions("x", x, 3, "[T, M, E]")
    checks.dtype("x", x)
    tokens, heads, columns = x.shape
    if heads == 0 or columns == 0:
        raise ValueError(f"x: got shape {list(x.shape)}; allowed: [T, M, E] with M and E at least 1")
    checks.dimensions("b", b, 3, "[T, N, D]")
    if b.shape[0] != tokens or b.shape[1] == 0 or heads % b.shape[1] or b.shape[2] == 0:
        seen = list(b.shape)
        raise ValueError(f"b: got shape {seen}; allowed: [{tokens}, N, D], T of x, with an N that divides {heads}")
    checks.dtype("b", b, (x.dtype,))
    checks.same_device("b", b, "x", x)
    checks.same("c", c, "b", b)
    checks.shape("dt", dt, (tokens, heads), "T and M of x")
    for name, tensor in (("a", a), ("d", d)):
        checks.shape(name, tensor, (heads,), "M of x")
    for name, tensor in (("dt", dt), ("a", a), ("d", d)):
        checks.dtype(name, tensor)
        checks.same_device(name, tensor, "x", x)
    document_bounds(cu_seqlens, "x", x)


def document_bounds(cu_seqlens: Tensor, name: str, tokens: Tensor) -> None:
    """Raise unless cu_seqlens is a vector of at least one int32, on the device of the tokens."""
    checks.dimensions("cu_seqlens", cu_seqlens, 1, "[documents + 1]")
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: got shape [0]; allowed: [documents + 1]")
    checks.dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    checks.same_device("cu_seqlens", cu_seqlens, name, tokens)


def documents_cover(cu_seqlens: Tensor, tokens: int, name: str) -> list[int]:
    """Raise ValueError unless cu_seqlens rises from 0 to tokens, the T of name; return it. Synchronises a GPU."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(end < begin for begin, end in pairwise(bounds)):
        seen = bounds if len(bounds) <= 8 else f"{bounds[:4]} ... {bounds[-4:]}"
        raise ValueError(f"cu_seqlens: got {seen}; allowed: from 0 to {tokens}, the T of {name}, never falling")
    return bounds


def documents_fit(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to tokens, in steps up to max_seqlen. Synchronises a GPU."""
    longest = max((end - begin for begin, end in pairwise(documents_cover(cu_seqlens, tokens, "q"))), default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen: got {max_seqlen}; allowed: at least {longest}, the longest document")


def document_of(cu_seqlens: Tensor, token: Tensor) -> Tensor:
    """The document of each token, [T], int64. cu_seqlens rises from 0; empty documents have no token.

    The search is in all of cu_seqlens: for a slice, code that Inductor of torch 2.11 compiles for a GPU searches from
    the start of the tensor that is sliced.
    """
    return torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1

"""Right gated delta rules."""

from collections.abc import Callable

import torch
from torch import Tensor

from conformance.peers import operation
from tests.judge.contract import Function
from unsloth_ref import checks, document_checks
from unsloth_ref import kernels as reference


def _gated_delta_rule(attend: Callable[..., Tensor]) -> Function:
    """Complete the rule, from heads [M, T, ...] in float32, a scaled q, and which tokens begin a document."""

    @operation
    def gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, *, scale: float | None = None
    ) -> Tensor:
        document_checks.gated_delta_rule_arguments(q, k, v, g, beta, cu_seqlens, scale)
        if torch.compiler.is_compiling() or not len(q):
            return reference.gated_delta_rule(q, k, v, g, beta, cu_seqlens, scale=scale)
        if checks.values_are_checked(cu_seqlens):
            document_checks.documents_cover(cu_seqlens, len(q), "q")
        first = (torch.arange(len(q), device=q.device) == cu_seqlens[:, None]).any(0)
        group, factor = v.shape[1] // q.shape[1], q.shape[2] ** -0.5 if scale is None else scale
        wide_q, wide_k = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (q, k))
        heads = (wide_q * factor, wide_k, *(x.float().transpose(0, 1) for x in (v, g, beta)))
        with torch.autocast(q.device.type, enabled=False):
            return attend(*heads, first).transpose(0, 1).to(v.dtype)

    return gated_delta_rule


@_gated_delta_rule
def by_matrices(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor) -> Tensor:
    """The state times exp(g) (I - beta k k^T), token by token."""
    state, rows = v.new_zeros(len(v), v.shape[2], k.shape[2]), []
    for t in range(q.shape[1]):
        key, rate = k[:, t, :, None], beta[:, t, None, None]
        eye = torch.eye(len(key[0]), device=q.device)
        state = g[:, t, None, None].exp() * state.where(~first[t], 0.0) @ (eye - rate * key @ key.mT)
        state = state + rate * v[:, t, :, None] @ key.mT
        rows.append(state @ q[:, t, :, None])
    return torch.cat(rows, 2).mT


@_gated_delta_rule
def by_halves(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, first: Tensor) -> Tensor:
    """Each column of v by itself, with the decay after the correction."""
    state, rows = v.new_zeros(len(v), k.shape[2], v.shape[2]), []
    for t in range(q.shape[1]):
        state, decay, key = state.where(~first[t], 0.0), g[:, t, None].exp(), k[:, t, :, None]
        correction = beta[:, t, None] * (v[:, t] - decay * (state * key).sum(1))
        state = decay[..., None] * state + key * correction[:, None]
        rows.append((q[:, t, :, None] * state).sum(1))
    return torch.stack(rows, 1)


def in_float64(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, *, scale: float | None = None
) -> Tensor:
    """More exact than required."""
    document_checks.gated_delta_rule_arguments(q, k, v, g, beta, cu_seqlens, scale)
    wide = (x.double() for x in (q, k, v, g, beta))
    return reference.gated_delta_rule(*wide, cu_seqlens, scale=scale).to(q.dtype)


TABLE = {
    "by_matrices": by_matrices,
    "by_halves": by_halves,
    "in_float64": in_float64,
    "in_other_chunks": (
        ('"ROWS": 32', '"ROWS": 16'),
        ("min(64 if narrow else 32, columns)", "16"),
    ),
}

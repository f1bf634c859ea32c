"""Right scans of Mamba 2."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.peers import operation
from tests.judge.contract import Function
from unsloth_ref import checks, document_checks
from unsloth_ref import kernels as reference


def _mamba2_scan(scan: Callable[..., Tensor]) -> Function:
    """Complete one document's scan, from heads [M, L, ...] in float32 and the logarithms of decays, to the contract."""

    @operation
    def mamba2_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor) -> Tensor:
        document_checks.mamba2_scan_arguments(x, dt, a, b, c, d, cu_seqlens)
        if torch.compiler.is_compiling() or not len(x):
            return reference.mamba2_scan(x, dt, a, b, c, d, cu_seqlens)
        bounds = document_checks.documents_cover(cu_seqlens, len(x), "x")
        wide_b, wide_c = (one.float().repeat_interleave(x.shape[1] // b.shape[1], 1).transpose(0, 1) for one in (b, c))
        values, step = x.float().transpose(0, 1), dt.float().t()
        heads = values, step, a.float()[:, None] * step, wide_b, wide_c
        with torch.autocast(x.device.type, enabled=False):
            parts = [scan(*(one[:, i:j] for one in heads), x.dtype) for i, j in pairwise(bounds) if i < j]
        return (torch.cat(parts, 1) + d.float()[:, None, None] * values).transpose(0, 1).to(x.dtype)

    return mamba2_scan


@_mamba2_scan
def by_pairs(x: Tensor, dt: Tensor, g: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """As attention without a softmax, each pair of tokens with a decay of its own."""
    length = x.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    rows = g[:, :, None].expand(-1, -1, length).masked_fill(~seen.tril(-1), 0.0).cumsum(1)
    decay = torch.where(seen, rows, -torch.inf).exp()
    return (decay * (c @ b.mT) * dt[:, None]) @ x


@_mamba2_scan
def in_rounded_chunks(x: Tensor, dt: Tensor, g: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """Chunks of 16 tokens, whose factors and states are rounded to bfloat16 if the inputs are."""
    length = x.shape[1]

    def rounded(values: Tensor) -> Tensor:
        return values.to(dtype).float() if dtype == torch.bfloat16 else values

    pad = -length % 16
    x, b, c = (F.pad(one, (0, 0, 0, pad)).unflatten(1, (-1, 16)) for one in (x, b, c))
    dt, g = (F.pad(one, (0, pad)).unflatten(1, (-1, 16))[..., None] for one in (dt, g))
    total = g.cumsum(2)
    seen = torch.ones(16, 16, dtype=torch.bool, device=x.device).tril()
    between = (total - total.mT).masked_fill(~seen, -torch.inf).exp()
    within = rounded(between * (c @ b.mT) * dt.mT) @ x
    added = b.mT @ rounded((total[:, :, -1:] - total).exp() * dt * x)
    state, rows = x.new_zeros(len(x), b.shape[3], x.shape[3]), []
    for chunk in range(x.shape[1]):
        rows.append(within[:, chunk] + total[:, chunk].exp() * (c[:, chunk] @ rounded(state)))
        state = total[:, chunk, -1:].exp() * state + added[:, chunk]
    return torch.cat(rows, 1)[:, :length]


def by_a_transposed_state(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Token by token, with matrix products; the steps are those of b."""
    document_checks.mamba2_scan_arguments(x, dt, a, b, c, d, cu_seqlens)
    if torch.compiler.is_compiling() or not len(x):
        return reference.mamba2_scan(x, dt, a, b, c, d, cu_seqlens)
    if checks.values_are_checked(cu_seqlens):
        document_checks.documents_cover(cu_seqlens, len(x), "x")
    first = (torch.arange(len(x), device=x.device) == cu_seqlens[:, None]).any(0)
    values, wide_b, wide_c = x.float(), *(one.float().repeat_interleave(x.shape[1] // b.shape[1], 1) for one in (b, c))
    added, decay = dt.float()[..., None] * wide_b, torch.exp(a.float() * dt.float())[..., None, None]
    state, rows = values.new_zeros(x.shape[1], x.shape[2], b.shape[2]), []
    with torch.autocast(x.device.type, enabled=False):
        for t in range(len(x)):
            state = decay[t] * state.where(~first[t], 0.0) + values[t, :, :, None] @ added[t, :, None]
            rows.append((state @ wide_c[t, :, :, None])[..., 0])
    return (torch.stack(rows) + d.float()[:, None] * values).to(x.dtype)


def in_float64(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor) -> Tensor:
    """More exact than required."""
    document_checks.mamba2_scan_arguments(x, dt, a, b, c, d, cu_seqlens)
    wide = [one.double() for one in (x, dt, a, b, c, d)]
    return reference.mamba2_scan(*wide, cu_seqlens=cu_seqlens).to(x.dtype)


TABLE = {
    "by_pairs": by_pairs,
    "in_rounded_chunks": in_rounded_chunks,
    "by_a_transposed_state": by_a_transposed_state,
    "in_float64": in_float64,
    "in_narrow_tiles": (("(min(widest, max(16,", "(min(16, max(16,"),),
}

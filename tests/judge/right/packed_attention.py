"""Right attentions of packed documents."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from conformance.peers import operation
from tests.judge.contract import Function
from unsloth_ref import document_checks
from unsloth_ref import kernels as reference


def _packed_attention(attend: Function) -> Function:
    """Complete one document's attention, from z and v, to the contract: checks, documents, heads, mask, softcap."""

    def scored(
        q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        heads_q, heads_k, heads_v = (x.transpose(0, 1).float() for x in (q, k, v))
        heads_k, heads_v = heads_k.repeat_interleave(group, 0), heads_v.repeat_interleave(group, 0)
        z = heads_q @ heads_k.mT * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        z = z.masked_fill(~seen, -torch.inf)
        if sinks is not None:  # one more key, with a value of 0
            z = torch.cat([z, sinks.float()[:, None, None].expand(-1, len(q), 1)], -1)
            heads_v = torch.cat([heads_v, heads_v.new_zeros(len(heads_v), 1, heads_v.shape[2])], 1)
        return attend(z, heads_v).transpose(0, 1).to(q.dtype)

    @operation
    def packed_attention(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any
    ) -> Tensor:
        scale, window, softcap = options.get("scale"), options.get("window"), options.get("softcap", 0.0)
        sinks = options.get("sinks")
        document_checks.packed_attention_arguments(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, sinks)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        place = torch.arange(len(q), device=q.device)
        seen = (place <= place[:, None]) & (place > place[:, None] - (window or len(q)))
        if torch.compiler.is_compiling():
            document = document_checks.document_of(cu_seqlens, place)
            with torch.autocast(q.device.type, enabled=False):
                return scored(q, k, v, seen & (document == document[:, None]), scale, softcap, sinks)
        document_checks.documents_fit(cu_seqlens, len(q), max_seqlen)
        parts = [slice(begin, end) for begin, end in pairwise(cu_seqlens.tolist())]
        with torch.autocast(q.device.type, enabled=False):  # whose torch.cat takes no float16 on a CPU
            return torch.cat([scored(q[p], k[p], v[p], seen[p, p], scale, softcap, sinks) for p in parts])

    return packed_attention


@_packed_attention
def divided_last(z: Tensor, v: Tensor) -> Tensor:
    """The output is divided by the sum of exponentials, not each weight."""
    weights = torch.exp(z - z.detach().amax(-1, keepdim=True)) if z.numel() else z
    return weights @ v / weights.sum(-1, keepdim=True)


@_packed_attention
def by_log_sum_exp(z: Tensor, v: Tensor) -> Tensor:
    """The log-sum-exp is subtracted before the exponential."""
    return torch.exp(z - torch.logsumexp(z, -1, keepdim=True)) @ v if z.numel() else z @ v


@_packed_attention
def of_torch(z: Tensor, v: Tensor) -> Tensor:
    """torch's softmax, and the product as a sum over keys."""
    return (torch.softmax(z, -1)[..., None] * v[:, None]).sum(2)


def in_float64(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any) -> Tensor:
    """More exact than required."""
    wide = (x.double() for x in (q, k, v))
    return reference.packed_attention(*wide, cu_seqlens, max_seqlen, **options).to(q.dtype)


TABLE = {
    "divided_last": divided_last,
    "by_log_sum_exp": by_log_sum_exp,
    "of_torch": of_torch,
    "in_float64": in_float64,
    "in_other_tiles": (
        ("rows = (32 if width <= 128 else 16) if wide else 64 if width <= 128 else 32", "rows = 16 if wide else 32"),
        ('"COLUMNS": rows, "WIDTH"', '"COLUMNS": 32, "WIDTH"'),
    ),
}

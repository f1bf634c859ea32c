"""Causal attention of packed documents, none of which sees another.

    s_ij = scale * q_i . k_j      z_ij = softcap * tanh(s_ij / softcap)        (softcap 0: z = s)
    p_ij = exp(z_ij - lse_i)                         o_i = sum over j of p_ij * v_j
    lse_i = log(exp(sink) + sum over j of exp(z_ij)) (without sinks: exp(sink) = 0)
    dv_j = sum over i of p_ij * do_i                 dp_ij = do_i . v_j
    ds_ij = p_ij * (dp_ij - sum over l of p_il * dp_il) * (1 - (z_ij / softcap)^2)
    dq_i = scale * sum over j of ds_ij * k_j         dk_j = scale * sum over i of ds_ij * q_i
    dsink = -sum over i of exp(sink - lse_i) * sum over l of p_il * dp_il

j and l run over the tokens that query i sees: those of its own document up to itself, and of these the last `window`.
Query heads share key and value heads in groups: query head h uses key and value head h // (N / K).

Sources: Vaswani et al. 2017, arXiv:1706.03762; grouped heads, Ainslie et al. 2023, arXiv:2305.13245; softcap, Gemma 2,
arXiv:2408.00118; sinks, gpt-oss, arXiv:2508.10925. Scores, softmax and sums are float32 for any input dtype (float64
for float64). As in flash attention, these are rounded to the dtype of the inputs: p in its product with v, dp, and the
part of dk and dv that each query head adds to its group. The sum over l of p_il * dp_il is o_i . do_i with the rounded
o.
"""

from itertools import pairwise

import torch
from torch import Tensor

from unsloth_ref import document_checks

QUERIES = 1024  # per block of scores, which bounds memory


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
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within each of the documents that are concatenated in q, k and v.

    Documents are independent: the bits of a document's output and gradients do not depend on any other document, even
    if that contains NaN. A NaN within a document may reach all of its rows.

    Args:
        q: [T, N, D], any float dtype.
        k: [T, K, D], as q; K divides N, and head h of q attends to head h // (N / K) of k and v.
        v: [T, K, D], as q.
        cu_seqlens: [documents + 1], int32: the first token of each document, then T. Documents may be empty.
        max_seqlen: number of tokens of the longest document, or more.
        scale: factor of the scores; 1 / sqrt(D) by default.
        window: number of tokens that a query sees, itself included; None for all tokens up to itself.
        softcap: bounds the scaled scores to (-softcap, softcap); 0 for none.
        sinks: [N], any float dtype: for each query head a score, neither scaled nor capped, of a token without value
            that every query sees; it takes weight from the others. None for none.

    Returns:
        [T, N, D] in q.dtype.

    Raises:
        ValueError: wrong shapes, devices or options; cu_seqlens does not rise from 0 to T, or a document is longer than
            max_seqlen. Compiled code does not check the last two; it masks tokens of other documents.
        TypeError: q or sinks do not have a float dtype, k or v differs from q in dtype, or cu_seqlens is not int32.
    """
    document_checks.packed_attention_arguments(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, sinks)
    tokens, limits = q.shape[0], (float(q.shape[2] ** -0.5 if scale is None else scale), window or q.shape[0], softcap)
    if torch.compiler.is_compiling():  # compiled code cannot read lengths
        document = document_checks.document_of(cu_seqlens, torch.arange(tokens, device=q.device))
        with torch.autocast(q.device.type, enabled=False):
            return _attention(q, k, v, sinks, *limits, document)
    document_checks.documents_fit(cu_seqlens, tokens, max_seqlen)
    bounds = [(begin, end) for begin, end in pairwise(cu_seqlens.tolist()) if begin < end] or [(0, 0)]
    with torch.autocast(q.device.type, enabled=False):
        return torch.cat([_attention(q[i:j], k[i:j], v[i:j], sinks, *limits) for i, j in bounds])


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    document: Tensor | None = None,
) -> Tensor:
    """Causal attention of one document, or of all documents, given the document of each token."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group, position = q.shape[1] // k.shape[1], torch.arange(len(q), device=q.device)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    heads_q, heads_k, heads_v = (x.transpose(0, 1).to(wide) for x in (q, k, v))
    parts = []
    for begin in range(0, max(1, len(q)), QUERIES):
        query, key = position[begin : begin + QUERIES, None], position[: begin + QUERIES]
        z = heads_q[:, begin : begin + QUERIES] @ heads_k[:, : begin + QUERIES].mT * scale
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        seen = (key <= query) & (key > query - window)
        if document is not None:
            seen &= document[query] == document[key]
        z = z.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(z, -1, keepdim=True)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(wide)[:, None, None])
        constant = lse.detach()
        p = torch.exp(z - constant).to(v.dtype).to(wide)
        out = (p @ heads_v[:, : begin + QUERIES]).to(q.dtype).to(wide)
        # The factor is 1. Its derivative is that of the sum of p, which is so multiplied by the rounded output.
        parts.append((out * torch.exp(constant - lse)).to(q.dtype))
    return torch.cat(parts, 1).transpose(0, 1)

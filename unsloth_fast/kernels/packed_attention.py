"""Causal attention of packed documents, none of which sees another.

    s_ij = scale * q_i . k_j      z_ij = softcap * tanh(s_ij / softcap)        (softcap 0: z = s)
    p_ij = exp(z_ij - lse_i)                         o_i = sum over j of p_ij * v_j
    lse_i = log(exp(sink) + sum over j of exp(z_ij)) (without sinks: exp(sink) = 0)
    dv_j = sum over i of p_ij * do_i                 dp_ij = do_i . v_j        delta_i = o_i . do_i
    ds_ij = p_ij * (dp_ij - delta_i) * (1 - (z_ij / softcap)^2)
    dq_i = scale * sum over j of ds_ij * k_j         dk_j = scale * sum over i of ds_ij * q_i
    dsink = -sum over i of exp(sink - lse_i) * delta_i

j runs over the tokens that query i sees: those of its own document up to itself, and of these the last `window`.

A program takes a tile of one document's queries, which it finds by bisection: the number of programs is at most that of
tiles plus that of documents, however uneven the lengths. Scores are computed tile by tile, and the backward pass
recomputes them twice: by queries for dq, and by keys for dk and dv, over the query heads of a group in turn. There are
no atomics: dq, dk, dv and dsink are sums in a fixed order. PyTorch's flash attention sums dq in any order, or takes
twice as long in a fixed one.

Saved: q, k, v, sinks, cu_seqlens, the output, and lse to base 2 [N, T] in float32.
Scores, softmax and sums are float32; p and ds are rounded to the dtype of the inputs before their products with v, do,
k and q. Bytes moved, with b bytes per element: (2N + 2K)TDb forward, (4N + 4K)TDb backward, and k, v, q and do once
more for each tile on the other side. Multiplications: 2D per pair of query and key forward, 7D backward.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._launch import (
    check_runnable,
    launch,
    next_power_of_2,
    register,
    rows_in_one_piece,
    shared_memory,
    strides_of,
)
from unsloth_fast.kernels._packed_attention import (
    packed_attention_dkdv_kernel,
    packed_attention_dq_kernel,
    packed_attention_forward_kernel,
)
from unsloth_fast.kernels._replay import call
from unsloth_ref import checks, document_checks


def tiles_of(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Queries and keys per tile, warps and stages, forward and backward; from width and dtype, not from lengths.

    On an H200, tiles of 64 x 64 with four warps were the fastest of eleven for 64 and 128 columns of bfloat16. float32
    is multiplied without tensor cores, from registers: backward with 64 columns, 64 x 64 took 9 times as long as
    32 x 32. With 128 columns 32 x 32 spills a little, and still takes 0.5 (forward) to 0.6 of the time of 16 x 16.
    With 512 columns of bfloat16, every target holds these tiles, and they spill at most 24 bytes on an H200.
    """
    width, wide = max(16, next_power_of_2(q.shape[2])), q.dtype == torch.float32
    rows = (32 if width <= 128 else 16) if wide else 64 if width <= 128 else 32
    # No fusion: scores that the backward pass rounds differently would not match the log-sum-exp of the forward pass.
    tile = {"ROWS": rows, "COLUMNS": rows, "WIDTH": width, "enable_fp_fusion": False}
    shallow, widest = wide or width > 128, width > 256
    warps = 8 if widest or (wide and width != 128) else 4
    small = width > 64 and shared_memory(q.device) <= 2**16  # bytes, those of AMD's GPUs: a third stage does not fit
    forward = {**tile, "num_warps": warps, "num_stages": 2 if shallow or small else 3}
    backward = {**tile, "num_warps": 8 if shallow else 4, "num_stages": 2 if wide or width > 64 else 3}
    return forward, backward | ({"COLUMNS": 16, "num_stages": 1} if widest else {})


def packed_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exps; a window of 0 stands for none."""
    tokens, heads, width = q.shape
    documents = len(cu_seqlens) - 1
    if tokens == 0 or documents == 0:
        return packed_attention_forward_outputs(q)
    cu_seqlens = cu_seqlens.contiguous()
    q, k, v = rows_in_one_piece(q, k, v)
    out, lse = packed_attention_forward_outputs(q)
    tile, _ = tiles_of(q)
    tiles = tokens // tile["ROWS"] + documents
    launch(
        packed_attention_forward_kernel, tiles * heads, q,
        q, k, v, q if sinks is None else sinks.contiguous(), out, lse, cu_seqlens,
        tokens, documents, tiles, heads, heads // k.shape[1], width, *strides_of(q, k, v), scale, softcap, window,
        SOFTCAP=softcap != 0, WINDOW=window != 0, SINKS=sinks is not None, **tile,
    )  # fmt: skip
    return out, lse


def packed_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, window: int, softcap: float,
) -> list[Tensor]:  # fmt: skip
    """Compute dq, dk, dv and, with sinks, dsinks, new and contiguous."""
    tokens, heads, width = q.shape
    documents = len(cu_seqlens) - 1
    dq, dk, dv, *dsinks = packed_attention_backward_outputs(do, q, k, v, cu_seqlens, sinks)
    if tokens == 0 or documents == 0:
        return [dq, dk, dv, *(gradient.zero_() for gradient in dsinks)]
    cu_seqlens = cu_seqlens.contiguous()
    q, k, v, do = rows_in_one_piece(q, k, v, do)
    delta, (_, tile) = torch.empty_like(lse), tiles_of(q)
    tiles_of_queries, tiles_of_keys = (tokens // tile[size] + documents for size in ("ROWS", "COLUMNS"))
    group, strides = heads // k.shape[1], strides_of(q, k, v, do)
    flags = {"SOFTCAP": softcap != 0, "WINDOW": window != 0}
    parts = q if sinks is None else lse.new_zeros((tiles_of_queries, heads))  # a program without queries writes none
    launch(
        packed_attention_dq_kernel, tiles_of_queries * heads, q,
        q, k, v, q if sinks is None else sinks.contiguous(), out, do, lse, delta, dq, parts, cu_seqlens,
        tokens, documents, tiles_of_queries, heads, group, width, *strides, scale, softcap, window,
        **flags, SINKS=sinks is not None, **tile,
    )  # fmt: skip
    launch(
        packed_attention_dkdv_kernel, tiles_of_keys * k.shape[1], q,
        q, k, v, do, lse, delta, dk, dv, cu_seqlens,
        tokens, documents, tiles_of_keys, heads, group, width, *strides, scale, softcap, window, **flags, **tile,
    )  # fmt: skip
    # In float64: in float32 the bits would depend on the number of tiles, which more documents without tokens raise.
    return [dq, dk, dv, *(gradient.copy_(parts.sum(0, dtype=torch.float64)) for gradient in dsinks)]


def packed_attention_forward_outputs(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """Allocate the output and the log-sum-exps."""
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def packed_attention_backward_outputs(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sinks: Tensor | None, *others: object
) -> list[Tensor]:
    """Allocate dq, dk, dv and, with sinks, dsinks."""
    return [tensor.new_empty(tensor.shape) for tensor in (q, k, v, sinks) if tensor is not None]


OPTIONS = "float scale, int window, float softcap"
forward_op = register(
    "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? sinks, "
    f"{OPTIONS}) -> (Tensor, Tensor)",
    packed_attention_forward,
    packed_attention_forward_outputs,
)
backward_op = register(
    "packed_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? sinks, Tensor out, "
    f"Tensor lse, {OPTIONS}) -> Tensor[]",
    packed_attention_backward,
    packed_attention_backward_outputs,
)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None,
        window: int | None, softcap: float, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.options = q.shape[2] ** -0.5 if scale is None else scale, window or 0, softcap
        out, lse = forward_op(q, k, v, cu_seqlens, sinks, *ctx.options)
        ctx.save_for_backward(q, k, v, cu_seqlens, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, do: Tensor, *saved: Tensor) -> Gradients:
        dq, dk, dv, *dsinks = backward_op(do, *saved, *ctx.options)
        return dq, dk, dv, *(None,) * (2 + len(ctx.options)), *(dsinks or (None,))


def check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None, window: int | None,
    softcap: float, sinks: Tensor | None,
) -> None:  # fmt: skip
    """Raise for arguments that packed_attention does not allow."""
    document_checks.packed_attention_arguments(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, sinks)
    if checks.values_are_checked(cu_seqlens):
        document_checks.documents_fit(cu_seqlens, q.shape[0], max_seqlen)
    check_runnable("q", q)


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
        q: [T, N, D], float16, bfloat16 or float32. Views whose last stride is 1 are not copied; others are.
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
        [T, N, D] in q.dtype, contiguous.

    Raises:
        ValueError: wrong shapes, devices or options; on a CPU, cu_seqlens does not rise from 0 to T, or a document is
            longer than max_seqlen. On CUDA and in compiled code, rows outside of all documents are undefined instead,
            and nothing outside the tensors is touched; UNSLOTH_DEBUG=1 makes CUDA raise too.
        TypeError: q is not float16, bfloat16 or float32, k or v differs from it in dtype, sinks do not have a float
            dtype, or cu_seqlens is not int32.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Vaswani et al. 2017, arXiv:1706.03762; grouped heads, Ainslie et al. 2023, arXiv:2305.13245; tiles, Dao et
    al. 2022, arXiv:2205.14135; softcap, Gemma 2, arXiv:2408.00118; sinks, gpt-oss, arXiv:2508.10925.
    """
    return call(_PackedAttention, check, q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, sinks)

"""Root-mean-square normalisation of the heads of queries and keys, then their rotary position embedding.

    r = 1 / sqrt(mean(x^2) + eps)      n = x * r      m = (offset + weight) * n      (x a head of q or k)
    y1 = m1 * cos1 - m2 * sin1         y2 = m2 * cos2 + m1 * sin2
    d1 = dy1 * cos1 + dy2 * sin2       d2 = dy2 * cos2 - dy1 * sin1
    g = d * (offset + weight)          dx = r * (g - n * mean(g * n))      dweight = sum over tokens and heads of d * n

y1 and y2 are the halves of the first D' columns of a head; for the others y = m and d = dy. One launch takes q and k: a
program takes one token with all of its heads and reads its row of cos and sin once. Saved: q, k, both weights, r of
each head in float32, cos, sin and positions. All arithmetic is float32; m is rounded as rms_norm rounds it, and the
results once. Bytes moved, for M tokens of N + K heads of D elements of b bytes: 2M(N+K)Db forward, 3M(N+K)Db backward;
rms_norm and rope in turn move 4 and 5. Gradients of weights are summed in a fixed order, without atomics: each program
writes one row of partial sums, and a second kernel adds these up.

The results and the gradients have the memory layout of q, token by token or head by head.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, once_differentiable
from unsloth_fast.kernels._launch import cdiv, check_runnable, launch, next_power_of_2, register, strides_of_angles
from unsloth_fast.kernels._norms import column_sum_grid
from unsloth_fast.kernels._qk_norm_rope import (
    qk_norm_rope_backward_kernel,
    qk_norm_rope_forward_kernel,
    qk_norm_rope_sums_kernel,
)
from unsloth_fast.kernels._replay import call, call_recorded
from unsloth_ref import checks
from unsloth_ref.types import Casting

PROGRAMS = 1024  # the most of a backward pass that sums gradients of weights: an H200 holds them all at once


def tiling(q: Tensor, k: Tensor) -> tuple[dict[str, int], int]:
    """Options of the forward pass, and its steps over heads: up to 4096 elements of q and of k, 16 per thread."""
    columns = next_power_of_2(q.shape[3])
    q_heads, k_heads = (min(next_power_of_2(max(1, x.shape[1])), max(1, 4096 // columns)) for x in (q, k))
    steps = max(cdiv(q.shape[1], q_heads), cdiv(k.shape[1], k_heads))
    warps = max(1, min(8, max(q_heads, k_heads) * columns // 512))
    return {"COLUMNS": columns, "Q_HEADS": q_heads, "K_HEADS": k_heads, "num_warps": warps}, steps


def backward_tiling(q: Tensor, k: Tensor) -> dict[str, int]:
    """Options of the backward pass: heads of 512 elements at a time, 8 per thread, which are one access in 16 bits."""
    columns = next_power_of_2(q.shape[3])
    heads = min(next_power_of_2(max(q.shape[1], k.shape[1])), max(1, 512 // columns))
    return {"COLUMNS": columns, "HEADS": heads, "num_warps": max(1, min(8, heads * columns // 256))}


def qk_norm_rope_forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    eps: float, offset: float, llama: bool, token_major: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute q and k normalised and rotated, and r of each head of both."""
    options = eps, offset, llama, token_major
    outputs = qk_norm_rope_forward_outputs(q, k, q_weight, k_weight, cos, sin, positions, *options)
    if q.numel() + k.numel() == 0:
        return outputs
    batches, q_heads, length, width = q.shape
    tile, steps = tiling(q, k)
    launch(
        qk_norm_rope_forward_kernel, batches * length, q,
        q, k, q_weight, k_weight, cos, sin, cos if positions is None else positions, *outputs,
        length, q_heads, k.shape[1], steps, width, cos.shape[-1] // 2, len(cos), eps,
        *q.stride(), *k.stride(), *q_weight.stride(), *k_weight.stride(), *strides_of_angles(cos, sin, positions),
        OFFSET=offset, LLAMA=llama, POSITIONS=positions is not None, TOKEN_MAJOR=token_major, **tile,
    )  # fmt: skip
    return outputs


def qk_norm_rope_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_rstd: Tensor,
    k_rstd: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    offset: float, llama: bool, token_major: bool, need_dx: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k and both weights; those that are not needed have no elements."""
    gradients = qk_norm_rope_backward_outputs(
        dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, positions,
        offset, llama, token_major, need_dx, need_dweight,
    )  # fmt: skip
    dq, dk, *dweights = gradients
    if q.numel() + k.numel() == 0:
        return dq, dk, dweights[0].zero_(), dweights[1].zero_()
    batches, q_heads, length, width = q.shape
    tokens = batches * length
    tile = backward_tiling(q, k)
    each = cdiv(tokens, PROGRAMS) if need_dweight else 1
    programs = cdiv(tokens, each)
    partial = q.new_empty((programs, 2 * width) if need_dweight else 0, dtype=torch.float32)
    launch(
        qk_norm_rope_backward_kernel, programs, q,
        dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, cos if positions is None else positions, q_rstd, k_rstd,
        dq, dk, partial, tokens, length, each, q_heads, k.shape[1],
        cdiv(q_heads, tile["HEADS"]), cdiv(k.shape[1], tile["HEADS"]), width, cos.shape[-1] // 2, len(cos),
        *dq_out.stride(), *dk_out.stride(), *q.stride(), *k.stride(), *q_weight.stride(), *k_weight.stride(),
        *strides_of_angles(cos, sin, positions),
        OFFSET=offset, LLAMA=llama, POSITIONS=positions is not None, TOKEN_MAJOR=token_major,
        NEED_DX=need_dx, NEED_DWEIGHT=need_dweight, **tile,
    )  # fmt: skip
    if need_dweight:
        blocks, options = column_sum_grid(programs, width)
        launch(qk_norm_rope_sums_kernel, 2 * blocks, q, partial, *dweights, programs, width, **options)
    return gradients


def _laid_out(x: Tensor, token_major: bool) -> Tensor:
    batches, heads, length, width = x.shape
    if token_major:
        return x.new_empty((batches, length, heads, width)).transpose(1, 2)
    return x.new_empty(x.shape)


def qk_norm_rope_forward_outputs(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    eps: float, offset: float, llama: bool, token_major: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate q and k normalised and rotated, and r of each head of both."""
    q_rstd, k_rstd = (x.new_empty((x.shape[0], x.shape[2], x.shape[1]), dtype=torch.float32) for x in (q, k))
    return _laid_out(q, token_major), _laid_out(k, token_major), q_rstd, k_rstd


def qk_norm_rope_backward_outputs(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_rstd: Tensor,
    k_rstd: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    offset: float, llama: bool, token_major: bool, need_dx: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate the gradients of q, k and both weights."""
    dq, dk = (_laid_out(x, token_major) if need_dx else x.new_empty(0) for x in (q, k))
    dq_weight, dk_weight = (weight.new_empty(weight.shape if need_dweight else 0) for weight in (q_weight, k_weight))
    return dq, dk, dq_weight, dk_weight


forward_op = register(
    "qk_norm_rope_forward(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "Tensor? positions, float eps, float offset, bool llama, bool token_major) -> (Tensor, Tensor, Tensor, Tensor)",
    qk_norm_rope_forward,
    qk_norm_rope_forward_outputs,
)
backward_op = register(
    "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, "
    "Tensor q_rstd, Tensor k_rstd, Tensor cos, Tensor sin, Tensor? positions, float offset, bool llama, "
    "bool token_major, bool need_dx, bool need_dweight) -> (Tensor, Tensor, Tensor, Tensor)",
    qk_norm_rope_backward,
    qk_norm_rope_backward_outputs,
)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
        positions: Tensor | None, eps: float, offset: float, casting: Casting,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.options = offset, casting == "llama", q.stride(1) < q.stride(2)
        inputs = q, k, q_weight, k_weight
        q_out, k_out, q_rstd, k_rstd = forward_op(*inputs, cos, sin, positions, eps, *ctx.options)
        ctx.save_for_backward(*inputs, q_rstd, k_rstd, cos, sin, positions)
        needs = ctx.needs_input_grad
        unneeded = [out for out, need in ((q_out, needs[0] or needs[2]), (k_out, needs[1] or needs[3])) if not need]
        ctx.mark_non_differentiable(*unneeded)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dq_out: Tensor, dk_out: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        found = backward_op(dq_out, dk_out, *saved, *ctx.options, needs[0] or needs[1], needs[2] or needs[3])
        return *(one if need else None for one, need in zip(found, needs, strict=True)), *(None,) * 6


def check(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    eps: float, offset: float, casting: Casting,
) -> None:  # fmt: skip
    """Raise for arguments that qk_norm_rope does not allow."""
    checks.head_norm_arguments(q, k, q_weight, k_weight, cos, sin, positions, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    if positions is not None and checks.values_are_checked(positions):
        checks.positions_in_table(positions, len(cos))
    for name, tensor in (("q", q), ("q_weight", q_weight), ("k_weight", k_weight)):
        check_runnable(name, tensor)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting: Casting = "llama",
) -> tuple[Tensor, Tensor]:
    """Scale each head to a root mean square of 1, multiply it by the weight, and rotate it by its position's angles.

    Args:
        q: [B, N, S, D], float16, bfloat16 or float32; computed in float32.
        k: [B, K, S, D], as q; K need not divide N. Either may be 0.
        q_weight: [D], float16, bfloat16 or float32.
        k_weight: [D], float16, bfloat16 or float32.
        cos: [B or 1, S, D'], or with positions a table [P, D']; in q's dtype or float32. D' is even and at most D: the
            other columns are only normalised. A constant: it gets no gradient.
        sin: as cos.
        positions: [B or 1, S], int32 or int64: the row of the table for each token.
        eps: added to the mean square; not negative.
        offset: added to the weights; 1.0 for Gemma, which stores weight - 1.
        casting: how the normalised heads are rounded, as in rms_norm; they are rounded to q.dtype before the rotation.

    Returns:
        q and k normalised and rotated, each in its own shape and dtype; in memory token by token if q is, else
        contiguous.

    Raises:
        ValueError: wrong shapes or devices; eps is negative or casting unknown; cos or sin requires a gradient; on a
            CPU, a position outside the table. On CUDA and in compiled code the rotated columns of such a token are NaN
            instead; UNSLOTH_DEBUG=1 makes CUDA raise too.
        TypeError: q or a weight does not have a float dtype or is float64, k differs from q in dtype, cos or sin is
            neither in q's dtype nor float32, or positions are not int32 or int64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Zhang and Sennrich 2019, arXiv:1910.07467; Su et al. 2021, arXiv:2104.09864; Yang et al. 2025,
    arXiv:2505.09388. The rotation is rounded once; transformers rounds its products too.
    """
    run = call if positions is not None and checks.values_are_checked(positions) else call_recorded
    return run(_QKNormRope, check, q, k, q_weight, k_weight, cos, sin, positions, eps, offset, casting)

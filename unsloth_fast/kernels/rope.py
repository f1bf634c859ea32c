"""Rotary position embedding of queries and keys: pairs of columns of a head, of both halves or neighbours, are rotated.

    y1 = x1 * cos1 - x2 * sin1      y2 = x2 * cos2 + x1 * sin2
    dx1 = dy1 * cos1 + dy2 * sin2   dx2 = dy2 * cos2 - dy1 * sin1

x1 and x2 are the halves of the first D' columns of a head; interleaved, they are its even and its odd columns.

One launch rotates q and k: a program takes one token with all of its heads and reads its row of cos and sin once. The
backward pass is the same kernel with sin1 and sin2 exchanged and negated, so it can itself be differentiated. Saved:
cos, sin and positions. All arithmetic is float32, with one rounding at the store. Bytes moved, for M tokens of N + K
heads of D elements of b bytes: 2M(N+K)Db in each pass, and cos and sin once.

The results have the memory layout of q, token by token or head by head: a later transpose is then a view, not a copy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, resolved
from unsloth_fast.kernels._launch import (
    cdiv,
    check_runnable,
    kernel,
    launch,
    next_power_of_2,
    register,
    strides_of_angles,
)
from unsloth_fast.kernels._replay import call, call_recorded
from unsloth_ref import checks


@triton.jit
def load_halves(row_ptr, inside, column, column_stride, half, other):
    """Load both halves of a row [1, HALF], or of the heads [HEADS, HALF] of a token."""
    first = tl.load(row_ptr + column * column_stride, inside, other=other)
    return first, tl.load(row_ptr + (half + column) * column_stride, inside, other=other)


@triton.jit
def load_pairs(row_ptr, head_inside, column, column_stride, units, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load the first and the second columns of all pairs of the heads of a token, [HEADS, HALF] each."""
    if INTERLEAVED:  # one load of whole vectors
        inside = head_inside & (column // UNIT < 2 * units)
        both = tl.load(row_ptr + column * column_stride, inside, other=0.0)
        return tl.split(tl.reshape(both, [both.shape[0], both.shape[1] // 2, 2]))
    else:
        return load_halves(row_ptr, head_inside & (column // UNIT < units), column, column_stride, units * UNIT, 0.0)


@triton.jit
def store_rotated(
    out_ptr, first, second, head_inside, column, units, cos1, cos2, sin1, sin2,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate and store the pairs of the heads of a token, with one rounding."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    rotated1, rotated2 = (first * cos1 - second * sin1).to(dtype), (second * cos2 + first * sin2).to(dtype)
    if INTERLEAVED:
        both = tl.reshape(tl.join(rotated1, rotated2), [first.shape[0], 2 * first.shape[1]])
        tl.store(out_ptr + column, both, head_inside & (column // UNIT < 2 * units))
    else:
        inside = head_inside & (column // UNIT < units)
        tl.store(out_ptr + column, rotated1, inside)
        tl.store(out_ptr + units * UNIT + column, rotated2, inside)


@triton.jit
def copy_rest(out_ptr, row_ptr, head_inside, column_stride, rotary, rest, UNIT: tl.constexpr, REST: tl.constexpr):
    """Copy the `rest` * UNIT columns that are not rotated."""
    column = tl.arange(0, REST).to(tl.int64)[None, :]
    inside = head_inside & (column // UNIT < rest)
    tl.store(out_ptr + rotary + column, tl.load(row_ptr + (rotary + column) * column_stride, inside), inside)


@kernel(varying=("length", "q_heads", "k_heads", "units", "rest", "table"), loops=("steps",))
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, q_out_ptr, k_out_ptr,
    length, q_heads, k_heads, steps, units, rest, table,
    q_batch, q_head, q_token, q_column, k_batch, k_head, k_token, k_column,
    cos_batch, cos_row, cos_column, sin_batch, sin_row, sin_column, positions_batch, positions_token,
    TRANSPOSED: tl.constexpr, POSITIONS: tl.constexpr, TOKEN_MAJOR: tl.constexpr, INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
):  # fmt: skip
    """All heads of one token per program, Q_HEADS of q and K_HEADS of k per step; 0 for one that is not wanted.

    Half of the rotated columns of a head are `units` * UNIT, the others `rest` * UNIT: this shows Triton that masks,
    second halves and heads begin at whole vectors.
    """
    program = tl.program_id(0).to(tl.int64)
    batch = program // length
    token = program % length
    half = units * UNIT
    width = (2 * units + rest) * UNIT
    column = tl.arange(0, HALF).to(tl.int64)[None, :]
    row = token
    known = column // UNIT < units
    if POSITIONS:
        row = tl.load(positions_ptr + batch * positions_batch + token * positions_token).to(tl.int64)
        known = column // UNIT < tl.where((row >= 0) & (row < table), units, 0)  # none if the row is outside the table
    cos_ptr += batch * cos_batch + row * cos_row
    sin_ptr += batch * sin_batch + row * sin_row
    cos1, cos2 = load_halves(cos_ptr, known, column, cos_column, half, float("nan"))
    sin1, sin2 = load_halves(sin_ptr, known, column, sin_column, half, float("nan"))
    cos1, cos2, sin1, sin2 = cos1.to(tl.float32), cos2.to(tl.float32), sin1.to(tl.float32), sin2.to(tl.float32)
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF).to(tl.int64)[None, :]
    q_ptr += batch * q_batch + token * q_token
    k_ptr += batch * k_batch + token * k_token
    if TOKEN_MAJOR:
        q_out_ptr += program * q_heads * width
        k_out_ptr += program * k_heads * width
        spacing = 1
    else:
        q_out_ptr += (batch * q_heads * length + token) * width
        k_out_ptr += (batch * k_heads * length + token) * width
        spacing = length
    for step in range(0, steps):
        # All loads come before the first store: the compiler cannot move them across it.
        if Q_HEADS:
            head = (step * Q_HEADS + tl.arange(0, Q_HEADS)).to(tl.int64)[:, None]
            q_known = head < q_heads
            q_rows, q_outs = q_ptr + head * q_head, q_out_ptr + head * width * spacing
            q1, q2 = load_pairs(q_rows, q_known, column, q_column, units, UNIT, INTERLEAVED)
        if K_HEADS:
            head = (step * K_HEADS + tl.arange(0, K_HEADS)).to(tl.int64)[:, None]
            k_known = head < k_heads
            k_rows, k_outs = k_ptr + head * k_head, k_out_ptr + head * width * spacing
            k1, k2 = load_pairs(k_rows, k_known, column, k_column, units, UNIT, INTERLEAVED)
        if Q_HEADS:
            store_rotated(q_outs, q1, q2, q_known, column, units, cos1, cos2, sin1, sin2, UNIT, INTERLEAVED)
            if REST:
                copy_rest(q_outs, q_rows, q_known, q_column, 2 * half, rest, UNIT, REST)
        if K_HEADS:
            store_rotated(k_outs, k1, k2, k_known, column, units, cos1, cos2, sin1, sin2, UNIT, INTERLEAVED)
            if REST:
                copy_rest(k_outs, k_rows, k_known, k_column, 2 * half, rest, UNIT, REST)


def heads_per_step(x: Tensor | None, half: int) -> int:
    """Number of heads of x that a program loads at once, a power of two: all heads, up to 8192 elements."""
    return 0 if x is None else min(next_power_of_2(x.shape[1]), max(1, 4096 // half))


def rope_rotate(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    transposed: bool,
    token_major: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k, or rotate them back; at most one of them is None, for which the result is empty."""
    q_out, k_out = rope_rotate_outputs(q, k, cos, sin, positions, interleaved, transposed, token_major)
    x = q if q is not None else k
    assert x is not None
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    batches, _, length, width = x.shape
    half = cos.shape[-1] // 2
    rest = width - 2 * half
    unit = 8 if half % 8 == rest % 8 == 0 else 1
    half_tile = next_power_of_2(half)
    q_tile, k_tile = heads_per_step(q, half_tile), heads_per_step(k, half_tile)
    q_heads, k_heads = (0 if t is None else t.shape[1] for t in (q, k))
    warps = next_power_of_2(max(1, (q_tile + k_tile) * half_tile // 512))  # about 32 elements per thread
    steps = max(cdiv(q_heads, q_tile) if q_tile else 0, cdiv(k_heads, k_tile) if k_tile else 0)
    launch(
        rope_kernel, batches * length, x,
        x if q is None else q, x if k is None else k, cos, sin, cos if positions is None else positions, q_out, k_out,
        length, q_heads, k_heads, steps, half // unit, rest // unit, len(cos),
        *(x if q is None else q).stride(), *(x if k is None else k).stride(), *strides_of_angles(cos, sin, positions),
        TRANSPOSED=transposed, POSITIONS=positions is not None, TOKEN_MAJOR=token_major,
        INTERLEAVED=interleaved, UNIT=unit, HALF=half_tile, REST=next_power_of_2(rest) if rest else 0,
        Q_HEADS=q_tile, K_HEADS=k_tile,
        num_warps=min(8, warps),
    )  # fmt: skip
    return q_out, k_out


def rope_rotate_outputs(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    transposed: bool,
    token_major: bool,
) -> tuple[Tensor, Tensor]:
    """Allocate q and k rotated."""

    def allocated(x: Tensor | None) -> Tensor:
        if x is None:
            return cos.new_empty(0)
        batches, heads, length, width = x.shape
        if token_major:
            return x.new_empty((batches, length, heads, width)).transpose(1, 2)
        return x.new_empty(x.shape)

    return allocated(q), allocated(k)


rotate_op = register(
    "rope_rotate(Tensor? q, Tensor? k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool transposed, "
    "bool token_major) -> (Tensor, Tensor)",
    rope_rotate,
    rope_rotate_outputs,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        q: Tensor | None,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
        transposed: bool,
        token_major: bool | None,
    ) -> tuple[Tensor, Tensor]:
        if token_major is None:
            token_major = q is not None and q.stride(1) < q.stride(2)
        ctx.save_for_backward(cos, sin, positions)
        ctx.set_materialize_grads(False)
        ctx.interleaved, ctx.transposed, ctx.token_major = interleaved, transposed, token_major
        rotated = rotate_op(q, k, cos, sin, positions, interleaved, transposed, token_major)
        ctx.mark_non_differentiable(*[r for r, need in zip(rotated, ctx.needs_input_grad, strict=False) if not need])
        return rotated

    @staticmethod
    def backward(ctx: Context, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        dq, dk = (resolved(one) if need else None for one, need in zip((dq, dk), ctx.needs_input_grad, strict=False))
        if dq is None and dk is None:
            return (None,) * 8
        differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        rotate = _Rope.apply if differentiated else rotate_op  # the former can be differentiated again
        q_grad, k_grad = rotate(dq, dk, cos, sin, positions, ctx.interleaved, not ctx.transposed, ctx.token_major)
        return None if dq is None else q_grad, None if dk is None else k_grad, *(None,) * 6


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *options: object) -> None:
    """Raise for arguments that rope does not allow."""
    checks.rope_arguments(q, k, cos, sin, positions)
    if positions is not None and checks.values_are_checked(positions):
        checks.positions_in_table(positions, len(cos))
    check_runnable("q", q)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions.

    Args:
        q: [B, N, S, D], float16, bfloat16 or float32; computed in float32.
        k: [B, K, S, D], as q; K need not divide N. Either may be 0.
        cos: [B or 1, S, D'], or with positions a table [P, D']; in q's dtype or float32. D' is even and at most D. A
            constant: it gets no gradient.
        sin: as cos.
        positions: [B or 1, S], int32 or int64: the row of the table for each token.
        interleaved: False pairs column i with column D'/2 + i, True column 2i with column 2i + 1. In both, column i of
            cos and sin is for the first column of pair i, column D'/2 + i for the second.

    Returns:
        q and k rotated, each in its own shape and dtype; in memory token by token if q is, else contiguous.

    Raises:
        ValueError: wrong shapes or devices; cos or sin requires a gradient; on a CPU, a position outside the table. On
            CUDA and in compiled code the rotated columns of such a token are NaN instead; UNSLOTH_DEBUG=1 makes CUDA
            raise too.
        TypeError: q does not have a float dtype or is float64, k differs from it in dtype, cos or sin is neither in q's
            dtype nor float32, or positions are not int32 or int64.
        RuntimeError: on a CPU without Triton's interpreter.

    Source: Su et al. 2021, arXiv:2104.09864. Rounded once; transformers rounds the products too.
    """
    run = call if positions is not None and checks.values_are_checked(positions) else call_recorded
    return run(_Rope, check, q, k, cos, sin, positions, interleaved, False, None)

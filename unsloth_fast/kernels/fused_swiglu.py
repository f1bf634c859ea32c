"""Gated activation with SiLU of a gate and an up projection in one tensor, and its clamped form.

    g = min(gate, limit)      u = max(-limit, min(up, limit))      s = 1 / (1 + exp(-alpha * g))
    y = g * s * (u + offset)
    dgate = dy * (u + offset) * s * (1 + alpha * g * (1 - s)), 0 where gate > limit
    dup = dy * g * s, 0 where |up| > limit

The gradient is written in the layout of gate_up: no concatenation follows. Tiles and the sigmoid are those of
`_gated.py`. Saved: gate_up. All arithmetic is float32, with one rounding at each store. Bytes moved, for M x F outputs
of b bytes: 3MFb forward (gate_up; y), 5MFb backward (dy, gate_up; dgate_up).
"""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, once_differentiable
from unsloth_fast.kernels._gated import share_and_slope, tile_indices, tiling
from unsloth_fast.kernels._launch import check_runnable, kernel, launch, register, rows_of
from unsloth_fast.kernels._replay import call_recorded
from unsloth_ref import checks


@triton.jit
def load_gate_and_up(
    rows_ptr, inside_rows, first, columns, column_stride,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gate and up in float32, from the column first on, of rows whose addresses are rows_ptr [ROWS, 1].

    Pairs are loaded as they lie, in whole vectors, and split.
    """
    if INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :]
        loaded = tl.load(rows_ptr + both * column_stride, inside_rows & (both < 2 * columns), other=0.0)
        gate, up = tl.split(tl.reshape(loaded, [ROWS, COLUMNS, 2]))
    else:
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = inside_rows & (column < columns)
        gate = tl.load(rows_ptr + column * column_stride, inside, other=0.0)
        up = tl.load(rows_ptr + (columns + column) * column_stride, inside, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def store_gate_and_up(
    rows_ptr, inside_rows, first, columns, gate, up,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_gate_and_up`, for rows in one piece."""
    gate, up = gate.to(rows_ptr.dtype.element_ty), up.to(rows_ptr.dtype.element_ty)
    if INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :]
        joined = tl.reshape(tl.join(gate, up), [ROWS, 2 * COLUMNS])
        tl.store(rows_ptr + both, joined, inside_rows & (both < 2 * columns))
    else:
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = inside_rows & (column < columns)
        tl.store(rows_ptr + column, gate, inside)
        tl.store(rows_ptr + columns + column, up, inside)


@triton.jit
def clamped(gate, up, LIMIT: tl.constexpr):
    """Both factors within the limit; NaN stays NaN."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up


@triton.jit
def through_clamps(dgate, dup, gate, up, LIMIT: tl.constexpr):
    """Both gradients, 0 where gate or up was not within the limit."""
    if LIMIT is not None:
        dgate = tl.where(gate <= LIMIT, dgate, 0.0)
        dup = tl.where((up <= LIMIT) & (up >= -LIMIT), dup, 0.0)
    return dgate, dup


@kernel(varying=("rows", "tiles_per_row"), fixed=("columns",))
def fused_swiglu_forward_kernel(
    gate_up_ptr, y_ptr, rows, columns, tiles_per_row, gate_up_row, gate_up_column,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y for one tile."""
    row, column = tile_indices(tiles_per_row, FLAT, ROWS, COLUMNS)
    first = (tl.program_id(0) % tiles_per_row).to(tl.int64) * COLUMNS
    gate, up = load_gate_and_up(
        gate_up_ptr + row * gate_up_row, row < rows, first, columns, gate_up_column, INTERLEAVED, ROWS, COLUMNS
    )
    gate, up = clamped(gate, up, LIMIT)
    share, _ = share_and_slope(gate * ALPHA, ACTIVATION)
    y = gate * share * (up + OFFSET)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), (row < rows) & (column < columns))


@kernel(varying=("rows", "tiles_per_row"), fixed=("columns",))
def fused_swiglu_backward_kernel(
    dy_ptr, gate_up_ptr, grad_ptr, rows, columns, tiles_per_row, dy_row, dy_column, gate_up_row, gate_up_column,
    INTERLEAVED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Both gradients for one tile."""
    row, column = tile_indices(tiles_per_row, FLAT, ROWS, COLUMNS)
    first = (tl.program_id(0) % tiles_per_row).to(tl.int64) * COLUMNS
    inside = (row < rows) & (column < columns)
    dy = tl.load(dy_ptr + row * dy_row + column * dy_column, inside, other=0.0).to(tl.float32)
    gate_in, up_in = load_gate_and_up(
        gate_up_ptr + row * gate_up_row, row < rows, first, columns, gate_up_column, INTERLEAVED, ROWS, COLUMNS
    )
    gate, up = clamped(gate_in, up_in, LIMIT)
    share, slope = share_and_slope(gate * ALPHA, "silu")
    dgate, dup = through_clamps(dy * (up + OFFSET) * slope, dy * (gate * share), gate_in, up_in, LIMIT)
    store_gate_and_up(grad_ptr + row * 2 * columns, row < rows, first, columns, dgate, dup, INTERLEAVED, ROWS, COLUMNS)


def tiles_of(y: Tensor) -> tuple[dict[str, int], int, int]:
    """What `tiling` returns, but without a kernel of its own for one row: batches may have any number of rows."""
    options, tiles_per_row, programs = tiling(y)
    return options | {"FLAT": False}, tiles_per_row, programs


def fused_gated_forward(
    gate_up: Tensor, activation: str, interleaved: bool, alpha: float, limit: float | None, offset: float
) -> Tensor:
    """Compute y, new and contiguous, for an activation of `_gated.py`."""
    y = fused_swiglu_forward_outputs(gate_up, interleaved, alpha, limit, offset)
    if y.numel() == 0:
        return y
    gate_up, of_y = rows_of(gate_up), rows_of(y)
    options, tiles_per_row, programs = tiles_of(of_y)
    launch(
        fused_swiglu_forward_kernel, programs, y, gate_up, y, *of_y.shape, tiles_per_row, *gate_up.stride(),
        ACTIVATION=activation, INTERLEAVED=interleaved, ALPHA=alpha, LIMIT=limit, OFFSET=offset, **options,
    )  # fmt: skip
    return y


def fused_swiglu_forward(
    gate_up: Tensor, interleaved: bool, alpha: float, limit: float | None, offset: float
) -> Tensor:
    """Compute y, new and contiguous."""
    return fused_gated_forward(gate_up, "silu", interleaved, alpha, limit, offset)


def fused_swiglu_backward(
    dy: Tensor, gate_up: Tensor, interleaved: bool, alpha: float, limit: float | None, offset: float
) -> Tensor:
    """Compute the gradient of gate_up, new and contiguous."""
    grad = fused_swiglu_backward_outputs(dy, gate_up, interleaved, alpha, limit, offset)
    if grad.numel() == 0:
        return grad
    dy, gate_up = rows_of(dy), rows_of(gate_up)
    options, tiles_per_row, programs = tiles_of(dy)
    launch(
        fused_swiglu_backward_kernel, programs, grad,
        dy, gate_up, grad, *dy.shape, tiles_per_row, *dy.stride(), *gate_up.stride(),
        INTERLEAVED=interleaved, ALPHA=alpha, LIMIT=limit, OFFSET=offset, **options,
    )  # fmt: skip
    return grad


def fused_swiglu_forward_outputs(
    gate_up: Tensor, interleaved: bool, alpha: float, limit: float | None, offset: float
) -> Tensor:
    """Allocate y."""
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def fused_swiglu_backward_outputs(
    dy: Tensor, gate_up: Tensor, interleaved: bool, alpha: float, limit: float | None, offset: float
) -> Tensor:
    """Allocate the gradient of gate_up."""
    return gate_up.new_empty(gate_up.shape)


forward_op = register(
    "fused_swiglu_forward(Tensor gate_up, bool interleaved, float alpha, float? limit, float offset) -> Tensor",
    fused_swiglu_forward,
    fused_swiglu_forward_outputs,
)
backward_op = register(
    "fused_swiglu_backward(Tensor dy, Tensor gate_up, bool interleaved, float alpha, float? limit, float offset) "
    "-> Tensor",
    fused_swiglu_backward,
    fused_swiglu_backward_outputs,
)


class _FusedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, gate_up: Tensor, interleaved: bool, alpha: float, limit: float | None, offset: float
    ) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.options = interleaved, alpha, limit, offset
        return forward_op(gate_up, interleaved, alpha, limit, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, gate_up: Tensor) -> tuple[Tensor | None, ...]:
        return backward_op(dy, gate_up, *ctx.options), None, None, None, None


def check(gate_up: Tensor, interleaved: bool, alpha: float, limit: float | None, offset: float) -> None:
    """Raise for arguments that fused_swiglu does not allow."""
    checks.fused_gated_arguments(gate_up, alpha, limit, offset)
    check_runnable("gate_up", gate_up)


def fused_swiglu(
    gate_up: Tensor,
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """Multiply the SiLU of the gate by up, element by element.

    Args:
        gate_up: [..., 2F], float16, bfloat16 or float32.
        interleaved: whether gate and up are the even and the odd columns (gpt-oss), not the halves (Phi-3, GLM).
        alpha: factor of the gate in the sigmoid; not negative; 1.702 for gpt-oss.
        limit: the gate is clamped to at most limit, up to [-limit, limit]; not negative; None for no limit.
        offset: added to up after the clamp; 1.0 for gpt-oss.

    Returns:
        [..., F] in gate_up.dtype, contiguous.

    Raises:
        ValueError: gate_up has an odd number of columns, alpha or limit is negative, or offset is not finite.
        TypeError: gate_up does not have a float dtype or is float64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Shazeer 2020, arXiv:2002.05202; OpenAI 2025, arXiv:2508.10925. Rounded once; transformers' Phi3MLP and
    GptOssExperts round factors too.
    """
    return call_recorded(_FusedSwiglu, check, gate_up, interleaved, alpha, limit, offset)

"""Gated activation with SiLU.

    s = 1 / (1 + exp(-gate))      y = gate * s * up
    dgate = dy * up * s * (1 + gate * (1 - s))      dup = dy * gate * s

Saved: gate and up. All arithmetic is float32, with one rounding at each store. Bytes moved, for M x F elements of b
bytes: 3MFb forward (gate, up; y), 5MFb backward (dy, gate, up; dgate, dup). Contiguous tensors are one long row;
others, such as the two halves of one projection, are read by their strides.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import Tile, cdiv, check_runnable, first_order, launch, register, rows_of, tile
from unsloth_ref import checks


@triton.jit
def exp_of_negative(x):
    """exp(x) for x <= 0 to a few ulp: exp2(x * log2(e)) alone loses |x| of them to the rounding of its argument."""
    x = tl.maximum(x, -150.0)  # exp(-150) is 0 in float32; -inf would make the remainder NaN
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 = 0.693359375 - 2.1219444e-4; the first has 10 bits, so its product with a small integer is exact
    rest = (x - whole * 0.693359375) + whole * 2.1219444005469057e-4
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), each without cancellation."""
    small = exp_of_negative(-tl.abs(x))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(x >= 0, larger, smaller), tl.where(x >= 0, smaller, larger)


@triton.jit
def tile_indices(tiles_a_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows [ROWS, 1] and columns [1, COLUMNS], int64, of this program's tile, tiles counted row by row."""
    program = tl.program_id(0)
    row = (program // tiles_a_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % tiles_a_row).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :]


@triton.jit
def swiglu_forward_kernel(
    gate_ptr, up_ptr, y_ptr, rows, columns, tiles_a_row, gate_row, gate_column, up_row, up_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y for one tile."""
    row, column = tile_indices(tiles_a_row, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    gate = tl.load(gate_ptr + row * gate_row + column * gate_column, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column * up_column, inside, other=0.0).to(tl.float32)
    sigmoid, _ = sigmoids(gate)
    y = gate * sigmoid * up
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    rows, columns, tiles_a_row, dy_row, dy_column, gate_row, gate_column, up_row, up_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEED_DGATE: tl.constexpr, NEED_DUP: tl.constexpr,
):  # fmt: skip
    """The gradients that are needed, for one tile."""
    row, column = tile_indices(tiles_a_row, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    dy = tl.load(dy_ptr + row * dy_row + column * dy_column, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + column * gate_column, inside, other=0.0).to(tl.float32)
    sigmoid, complement = sigmoids(gate)
    if NEED_DGATE:
        up = tl.load(up_ptr + row * up_row + column * up_column, inside, other=0.0).to(tl.float32)
        dgate = dy * up * (sigmoid * (1.0 + gate * complement))
        tl.store(dgate_ptr + row * columns + column, dgate.to(dgate_ptr.dtype.element_ty), inside)
    if NEED_DUP:
        dup = dy * (gate * sigmoid)
        tl.store(dup_ptr + row * columns + column, dup.to(dup_ptr.dtype.element_ty), inside)


def as_matrices(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as matrices of one shape: a single row if all are contiguous, else [rows, F]."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [rows_of(tensor) for tensor in tensors]


def tiling(matrix: Tensor) -> tuple[Tile, int, int]:
    """The tile for a matrix, and how many cover a row and all of it. 16 elements a thread are two 16-byte loads."""
    shape = tile(matrix.shape[1], elements=4096, widest=4096, per_thread=16)
    tiles_a_row = cdiv(matrix.shape[1], shape.columns)
    return shape, tiles_a_row, cdiv(matrix.shape[0], shape.rows) * tiles_a_row


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y, new and contiguous."""
    y = gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return y
    gate, up = as_matrices(gate, up)
    shape, tiles_a_row, programs = tiling(gate)
    launch(
        swiglu_forward_kernel, programs, gate, gate, up, y, *gate.shape, tiles_a_row, *gate.stride(), *up.stride(),
        ROWS=shape.rows, COLUMNS=shape.columns, num_warps=shape.warps,
    )  # fmt: skip
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool) -> tuple[Tensor, Tensor]:
    """dgate and dup, new and contiguous; one that is not needed is empty."""
    dgate, dup = swiglu_backward_fake(dy, gate, up, need_dgate, need_dup)
    if gate.numel() == 0:
        return dgate, dup
    dy, gate, up = as_matrices(dy, gate, up)
    shape, tiles_a_row, programs = tiling(gate)
    launch(
        swiglu_backward_kernel, programs, gate, dy, gate, up, dgate, dup,
        *gate.shape, tiles_a_row, *dy.stride(), *gate.stride(), *up.stride(),
        ROWS=shape.rows, COLUMNS=shape.columns, NEED_DGATE=need_dgate, NEED_DUP=need_dup, num_warps=shape.warps,
    )  # fmt: skip
    return dgate, dup


def swiglu_forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    """y, unfilled."""
    return gate.new_empty(gate.shape)


def swiglu_backward_fake(
    dy: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """dgate and dup, unfilled."""
    return gate.new_empty(gate.shape if need_dgate else 0), up.new_empty(up.shape if need_dup else 0)


forward_op = register("swiglu_forward(Tensor gate, Tensor up) -> Tensor", swiglu_forward, swiglu_forward_fake)
backward_op = register(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, bool need_dgate, bool need_dup) -> (Tensor, Tensor)",
    swiglu_backward,
    swiglu_backward_fake,
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return forward_op(gate, up)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor | None, Tensor | None]:
        need_dgate, need_dup = ctx.needs_input_grad
        dgate, dup = backward_op(dy, gate, up, need_dgate, need_dup)
        return dgate if need_dgate else None, dup if need_dup else None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of the gate times up, element by element.

    Args:
        gate: [..., F], float16, bfloat16 or float32.
        up: [..., F], as gate.

    Returns:
        [..., F] in gate.dtype, contiguous.

    Raises:
        ValueError: up has not the shape or device of gate.
        TypeError: gate is not of a float dtype or is float64, or up is not of the same.
        RuntimeError: on a CPU without Triton's interpreter, and on a second backward through the gradients.

    Source: Shazeer 2020, arXiv:2002.05202. Rounded once, where transformers' LlamaMLP rounds the activation too.
    """
    checks.gated_arguments(gate, up)
    check_runnable("gate", gate)
    return _SwiGLU.apply(gate, up)

"""Residual addition and root-mean-square normalisation.

    sum = x + residual      r = 1 / sqrt(mean(sum^2) + eps)      n = sum * r      normed = (offset + weight) * n
    g = dnormed * (offset + weight)      dx = dresidual = dsum + r * (g - n * mean(g * n))
    dweight = sum over rows of dnormed * n

Saved: sum, weight and r [rows] in float32. All arithmetic is float32; sum is rounded to x.dtype before it is
normalised, and further rounding is that of rms_norm. Bytes moved, for M x H elements of b bytes: 4MHb forward (x,
residual; sum, normed), 4MHb backward (dnormed, dsum, sum; dx, which is also dresidual), 3MHb if sum is not used. The
backward pass is that of rms_norm, with dsum added before the rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, once_differentiable
from unsloth_fast.kernels._launch import cdiv, check_runnable, kernel, launch, register, rows_of, tile
from unsloth_fast.kernels._norms import load_scale, load_tile, quotient, rounded
from unsloth_fast.kernels._replay import call_recorded
from unsloth_fast.kernels.rms_norm import backward_op
from unsloth_ref import checks
from unsloth_ref.types import Casting


@triton.jit
def load_sum(
    x_ptr, residual_ptr, row, column, rows, columns, x_row, x_column, residual_row, residual_column,
    dtype: tl.constexpr,
):  # fmt: skip
    """Load a tile of x + residual, rounded to dtype, in float32."""
    x = load_tile(x_ptr, row, column, rows, columns, x_row, x_column)
    residual = load_tile(residual_ptr, row, column, rows, columns, residual_row, residual_column)
    return (x + residual).to(dtype).to(tl.float32)


@kernel(varying=("rows",), fixed=("columns",))
def add_rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, sum_ptr, rstd_ptr,
    rows, columns, x_row, x_column, residual_row, residual_column, weight_stride, eps,
    OFFSET: tl.constexpr, LLAMA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program. WHOLE: a tile holds whole rows; otherwise they are read twice, the second time from L2."""
    dtype = normed_ptr.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    total = load_sum(
        x_ptr, residual_ptr, row, column, rows, columns, x_row, x_column, residual_row, residual_column, dtype
    )
    squares = total * total
    if not WHOLE:
        for start in range(COLUMNS, columns, COLUMNS):
            total = load_sum(
                x_ptr, residual_ptr, row, start + column, rows, columns, x_row, x_column, residual_row,
                residual_column, dtype,
            )  # fmt: skip
            squares += total * total
    mean = quotient(tl.sum(squares, 1, keep_dims=True), columns)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, row < rows)
    if WHOLE:
        inside = (row < rows) & (column < columns)
        tl.store(sum_ptr + row * columns + column, total.to(dtype), inside)
        scale = load_scale(weight_ptr, column, columns, weight_stride, OFFSET)
        normed = rounded(total * rstd, dtype, LLAMA) * scale
        tl.store(normed_ptr + row * columns + column, normed.to(dtype), inside)
    else:
        for start in range(0, columns, COLUMNS):
            inside = (row < rows) & (start + column < columns)
            total = load_sum(
                x_ptr, residual_ptr, row, start + column, rows, columns, x_row, x_column, residual_row,
                residual_column, dtype,
            )  # fmt: skip
            tl.store(sum_ptr + row * columns + start + column, total.to(dtype), inside)
            scale = load_scale(weight_ptr, start + column, columns, weight_stride, OFFSET)
            normed = rounded(total * rstd, dtype, LLAMA) * scale
            tl.store(normed_ptr + row * columns + start + column, normed.to(dtype), inside)


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute normed, sum and r, new and contiguous."""
    normed, total, rstd = add_rms_norm_forward_outputs(x, residual, weight, eps, offset, llama)
    if x.numel() == 0:
        return normed, total, rstd
    x, residual = rows_of(x), rows_of(residual)
    rows, columns = x.shape
    shape = tile(columns, elements=2048, widest=16384, per_thread=32 if columns <= 8192 else 16)
    launch(
        add_rms_norm_forward_kernel, cdiv(rows, shape.rows), x,
        x, residual, weight, normed, total, rstd,
        rows, columns, *x.stride(), *residual.stride(), *weight.stride(), eps,
        OFFSET=offset, LLAMA=llama, ROWS=shape.rows, COLUMNS=shape.columns, WHOLE=columns <= shape.columns,
        num_warps=shape.warps,
    )  # fmt: skip
    return normed, total, rstd


def add_rms_norm_forward_outputs(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate normed, sum and r."""
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


forward_op = register(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps, float offset, bool llama) -> "
    "(Tensor, Tensor, Tensor)",
    add_rms_norm_forward,
    add_rms_norm_forward_outputs,
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: Casting
    ) -> tuple[Tensor, Tensor]:
        llama = casting == "llama"
        normed, total, rstd = forward_op(x, residual, weight, eps, offset, llama)
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            ctx.mark_non_differentiable(total)  # it does not depend on the weight
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset, ctx.llama = offset, llama
        ctx.set_materialize_grads(False)  # no zeros are written and read for the unused sum of a model's last norm
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context, dnormed: Tensor | None, dsum: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
    ) -> tuple[Tensor | None, ...]:
        need_x, need_residual, need_dweight = ctx.needs_input_grad[:3]
        need_dx = need_x or need_residual
        if dnormed is None:
            dx, dweight = dsum, None
        else:
            dx, dweight = backward_op(dnormed, dsum, total, weight, rstd, ctx.offset, ctx.llama, need_dx, need_dweight)
        # One tensor is the gradient of both, as for the terms of a sum in torch: autograd never writes into it.
        return (
            dx if need_x else None,
            dx if need_residual else None,
            dweight if need_dweight else None,
            None,
            None,
            None,
        )


def check(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: Casting) -> None:
    """Raise for arguments that add_rms_norm does not allow."""
    checks.norm_arguments(x, weight, eps)
    checks.same("residual", residual, "x", x)
    checks.one_of("casting", casting, ("llama", "gemma"))
    check_runnable("x", x)
    check_runnable("weight", weight)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise the sum as rms_norm does.

    Args:
        x: [..., H], float16, bfloat16 or float32; computed in float32.
        residual: [..., H], as x.
        weight: [H], float16, bfloat16 or float32.
        eps: added to the mean square; not negative.
        offset: added to the weight; 1.0 for Gemma, which stores weight - 1.
        casting: "llama" rounds the normalised row to x.dtype before the product, "gemma" rounds once, at the end.

    Returns:
        normed: [..., H] in x.dtype, the rounded sum normalised, contiguous.
        sum: [..., H], x + residual rounded to x.dtype, contiguous.

    Raises:
        ValueError: residual differs from x in shape or device, weight is not [H] on the device of x, eps is negative,
            or casting is unknown.
        TypeError: x or weight does not have a float dtype or is float64, or residual differs from x in dtype.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467. Rounding: as in a transformers decoder layer.
    """
    return call_recorded(_AddRMSNorm, check, x, residual, weight, eps, offset, casting)

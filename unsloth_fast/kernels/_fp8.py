"""Float8 numbers (e4m3) in kernels: conversions, the quantisation of blocks, and products with a float8 weight.

Kernels read and write float8 as bytes. Triton's interpreter and GPUs before sm_89 cannot convert them, so `decoded` has
a form that moves bits. Both forms are exact: every e4m3 number is one in float16, bfloat16 and float32.

Products are those of 16-bit numbers (of float32 numbers where the left factor is float32), summed in float32: products
of two e4m3 numbers have at most 8 significant bits. The tensor cores of sm_90 also multiply e4m3 itself, twice as fast,
but add up fewer bits than float32 has, of a number that is not documented.
"""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from unsloth_fast.kernels._launch import INTERPRETED, cdiv, kernel, launch, next_power_of_2
from unsloth_ref.float8_checks import BLOCK

EMULATED = tl.constexpr(INTERPRETED)
GROUP = 8  # tiles of rows whose programs run together and share their columns of the weight


@triton.jit
def decoded(numbers, DTYPE: tl.constexpr):
    """Bytes of e4m3 as numbers of a dtype."""
    if not EMULATED and cuda_capability_geq(8, 9):
        return numbers.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    wide = numbers.to(tl.int32)
    # The bits of a float16 that is 2^-8 times the number; its largest exponents are not used, as in e4m3.
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    value = tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return value.to(DTYPE)


@triton.jit
def nearest_e4m3(x):
    """A float32 number of at most 448 in size, rounded to the nearest e4m3 number, ties to even; NaN stays NaN."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # A sum with 1.5 * 2^20 times the power of two below |x| has its last place at the last bit of e4m3.
    shift = tl.maximum(power, 0.015625) * 1572864.0
    return (x + shift) - shift


@triton.jit
def encoded(x):
    """The byte of a float32 number that `nearest_e4m3` has rounded; NaN becomes 0x7F."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> 20) - 960  # three bits of the fraction, and the exponent with a bias of 7 instead of 127
    subnormal = (tl.abs(x) * 512.0).to(tl.int32)
    byte = tl.where(magnitude >= 0x3C800000, normal, subnormal)  # from 2^-6 on
    return tl.where(magnitude > 0x7F800000, 0x7F, byte).to(tl.uint8)


@triton.jit
def scale_of(magnitude):
    """The scale of a block from the bits of its largest magnitude, of which NaN has the largest, then infinity."""
    largest = magnitude.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    return tl.where(largest == 0.0, 1.0, scale)


@kernel(varying=("rows", "column_blocks"), fixed=("columns",))
def fp8_quantize_kernel(
    x_ptr, values_ptr, scale_ptr, rows, columns, column_blocks, x_row, x_column,
    WHOLE: tl.constexpr, ENCODED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of one block (WHOLE), or of a block per row: its e4m3 numbers, as bytes if ENCODED, and scales."""
    tile = tl.program_id(0) // column_blocks
    block = tl.program_id(0) % column_blocks
    row = tile * ROWS + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row, column = row.to(tl.int64), column.to(tl.int64)
    pointers = x_ptr + row[:, None] * x_row + column[None, :] * x_column
    x = tl.load(pointers, inside, other=0.0).to(tl.float32)
    magnitude = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    if WHOLE:
        magnitude = tl.zeros_like(magnitude) + tl.max(magnitude, 0)
    scale = scale_of(magnitude)
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    number = nearest_e4m3(quotient)
    offset = row[:, None] * columns + column[None, :]
    if ENCODED:
        negative = ((quotient.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.uint8)
        tl.store(values_ptr + offset, encoded(number) | negative, inside)
    else:
        tl.store(values_ptr + offset, number.to(values_ptr.dtype.element_ty), inside)
    if WHOLE:
        tl.store(scale_ptr + tile.to(tl.int64) * column_blocks + block + tl.zeros_like(row), scale, row == tile * ROWS)
    else:
        tl.store(scale_ptr + row * column_blocks + block, scale, row < rows)


@kernel(varying=("rows", "column_blocks", "scale_row", "scale_column"), fixed=("columns",))
def fp8_dequantize_kernel(
    values_ptr, scale_ptr, x_ptr, rows, columns, column_blocks,
    values_row, values_column, scale_row, scale_column, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x for a tile that lies in one block (WHOLE), or in a block per row."""
    row = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    block = (tl.program_id(0) % column_blocks).to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row = row.to(tl.int64)
    numbers = tl.load(values_ptr + row[:, None] * values_row + column[None, :] * values_column, inside, other=0)
    of_row = row // COLUMNS if WHOLE else row
    scale = tl.load(scale_ptr + of_row * scale_row + block * scale_column, row < rows, other=0.0)
    x = decoded(numbers, tl.float32) * scale[:, None]
    tl.store(x_ptr + row[:, None] * columns + column[None, :], x.to(x_ptr.dtype.element_ty), inside)


SCALES = "left_scale_row", "left_scale_column", "scale_column_stride", "scale_inner_stride"


@kernel(varying=("rows", "column_blocks", *SCALES), fixed=("columns", "inner"))
def fp8_product_kernel(
    left_ptr, left_scale_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, rows, columns, inner, column_blocks,
    left_row, left_column, left_scale_row, left_scale_column, weight_column_stride, weight_inner_stride,
    scale_column_stride, scale_inner_stride, bias_stride,
    QUANTISED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile of the product of left and a float8 weight, which lies in one column of the weight's blocks."""
    row_tiles = tl.cdiv(rows, ROWS)
    begin = tl.program_id(0) // (GROUP * column_blocks) * GROUP
    height = tl.minimum(row_tiles - begin, GROUP)
    place = tl.program_id(0) % (GROUP * column_blocks)
    row = (begin + place % height) * ROWS + tl.arange(0, ROWS)
    column = place // height * COLUMNS + tl.arange(0, COLUMNS)
    block = (place // height * COLUMNS // BLOCK).to(tl.int64)
    inside_rows, inside_columns = (row < rows)[:, None], (column < columns)[None, :]
    row, column = row.to(tl.int64), column.to(tl.int64)
    left_rows, weight_columns = left_ptr + row[:, None] * left_row, weight_ptr + column[None, :] * weight_column_stride
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for first in range(0, inner, INNER):
        k = first + tl.arange(0, INNER)
        inside = k < inner
        k = k.to(tl.int64)
        left = tl.load(left_rows + k[None, :] * left_column, inside_rows & inside[None, :], other=0.0)
        numbers = tl.load(weight_columns + k[:, None] * weight_inner_stride, inside[:, None] & inside_columns, other=0)
        if EMULATED:  # the interpreter would multiply the bits of bfloat16
            left = left.to(tl.float32)
        part = tl.dot(left, decoded(numbers, left.dtype), input_precision="ieee")
        of_inner = tl.cast(first // BLOCK, tl.int64)
        scale = tl.load(scale_ptr + block * scale_column_stride + of_inner * scale_inner_stride)
        if QUANTISED:
            left_scale = left_scale_ptr + row * left_scale_row + of_inner * left_scale_column
            total += part * (tl.load(left_scale, row < rows, other=0.0) * scale)[:, None]
        else:
            total += part * scale
    if BIASED:
        total += tl.load(bias_ptr + column * bias_stride, column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + row[:, None] * columns + column[None, :], total.to(y_ptr.dtype.element_ty), inside_rows & inside_columns
    )


def quantise(x: Tensor, block_rows: int, values: Tensor, scale: Tensor) -> None:
    """Quantise x [rows, columns] of any strides into values, bytes or float16, and scale, both contiguous."""
    rows, columns = x.shape
    if x.numel():
        whole = block_rows == BLOCK
        height = BLOCK if whole else 32
        launch(
            fp8_quantize_kernel, cdiv(rows, height) * scale.shape[1], x,
            x, values, scale, rows, columns, scale.shape[1], *x.stride(),
            WHOLE=whole, ENCODED=values.dtype == torch.uint8, ROWS=height, COLUMNS=BLOCK, num_warps=8 if whole else 4,
        )  # fmt: skip


def product(
    left: Tensor, left_scale: Tensor | None, numbers: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Write left [T, H], times left_scale [T, H / 128], @ numbers [O, H]^T, times scale, + bias [O] into y [T, O].

    numbers are bytes of e4m3. Transposed, they and their scale multiply the other way round. y is contiguous, the
    others have any strides.
    """
    (rows, inner), columns = left.shape, len(numbers)
    if y.numel() == 0:
        return
    wide = left.dtype == torch.float32
    width = min(64 if wide else BLOCK, max(16, next_power_of_2(columns)))
    column_blocks = cdiv(columns, width)
    height = 64 if wide else 128
    of_left, vector = scale if left_scale is None else left_scale, scale if bias is None else bias
    launch(
        fp8_product_kernel, cdiv(rows, height) * column_blocks, left,
        left, of_left, numbers, scale, vector, y, rows, columns, inner, column_blocks,
        *left.stride(), *of_left.stride(), *numbers.stride(), *scale.stride(), vector.stride(0),
        QUANTISED=left_scale is not None, BIASED=bias is not None, BLOCK=BLOCK, GROUP=GROUP,
        ROWS=height, COLUMNS=width, INNER=32 if wide else 64, num_warps=8 if width >= 64 else 4, num_stages=3,
    )  # fmt: skip

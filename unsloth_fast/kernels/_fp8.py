"""Float8 numbers (e4m3) in kernels: conversions, and the quantisation of blocks.

Kernels read and write float8 as bytes. Triton's interpreter and GPUs before sm_89 cannot convert them, so `decoded` and
`encoded` have forms that move bits. Both forms are exact: every e4m3 number is one in float16, bfloat16 and float32.
"""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from unsloth_fast.kernels._launch import INTERPRETED, cdiv, kernel, launch
from unsloth_ref.float8_checks import BLOCK, blocks

EMULATED = tl.constexpr(INTERPRETED)


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
    """The byte of the e4m3 number that is nearest to a float32 number of at most 448 in size, NaN for NaN."""
    if not EMULATED and cuda_capability_geq(8, 9):
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    negative = ((x.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.uint8)
    x = nearest_e4m3(x)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    normal = (magnitude >> 20) - 960  # three bits of the fraction, and the exponent with a bias of 7 instead of 127
    subnormal = (tl.abs(x) * 512.0).to(tl.int32)
    byte = tl.where(magnitude >= 0x3C800000, normal, subnormal)  # from 2^-6 on
    return tl.where(magnitude > 0x7F800000, 0x7F, byte).to(tl.uint8) | negative


@triton.jit
def fused(a, b, c):
    """a * b + c, rounded once: tl.fma is so on a GPU; the interpreter rounds its product too."""
    if EMULATED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def quotients(x, scale):
    """x / scale, correctly rounded as by tl.div_rn, with four multiplications in place of a division.

    The scales [ROWS, 1] are those of the rows, from 2^-126 on. With the reciprocal of the divisor, correctly rounded,
    the quotient is a step of Newton's away (Markstein 1990). Its excess is exact, unless it is subnormal: therefore
    both numbers are multiplied by 2^64 where the scale is small. What is left rounds to 0 in e4m3.
    """
    lift = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # 2^-60
    x *= lift
    divisor = scale * lift
    reciprocal = tl.broadcast_to(tl.div_rn(1.0, divisor), x.shape)
    # x / inf is 0 and inf / inf NaN: the product with 0, to which the excess adds nothing then.
    divisor = tl.broadcast_to(tl.where(divisor == float("inf"), 0.0, divisor), x.shape)
    quotient = x * reciprocal
    excess = fused(quotient, divisor, -x)
    return fused(-excess, reciprocal, quotient)  # -0 stays -0


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
    """A tile of one block (WHOLE), or of a block per row: bytes of e4m3 and scales, or (not ENCODED) their products."""
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
    quotient = quotients(x, scale[:, None])
    offset = row[:, None] * columns + column[None, :]
    if not ENCODED:
        x = nearest_e4m3(quotient) * scale[:, None]
        tl.store(values_ptr + offset, x.to(values_ptr.dtype.element_ty), inside)
        return
    tl.store(values_ptr + offset, encoded(quotient), inside)
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


def quantise(x: Tensor, block_rows: int, values: Tensor, scale: Tensor | None = None) -> None:
    """Quantise x [rows, columns] of any strides into values, which are bytes, and scale, both contiguous.

    Without a scale, values are the numbers times their scales instead, in a float dtype.
    """
    (rows, columns), whole = x.shape, block_rows == BLOCK
    if x.numel():
        height = BLOCK if whole else 32
        launch(
            fp8_quantize_kernel, cdiv(rows, height) * blocks(columns), x,
            x, values, values if scale is None else scale, rows, columns, blocks(columns), *x.stride(),
            WHOLE=whole, ENCODED=scale is not None, ROWS=height, COLUMNS=BLOCK, num_warps=16 if whole else 4,
        )  # fmt: skip

"""What norms share: tiles of rows, and the backward pass's sums over all rows."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import cdiv, next_power_of_2, shared_memory


@triton.jit
def within(row, column, rows, columns, FULL: tl.constexpr):
    """Where a tile lies in the matrix. FULL: with all of its columns."""
    return row < rows if FULL else (row < rows) & (column < columns)


@triton.jit
def load_tile(pointer, row, column, rows, columns, row_stride, column_stride, FULL: tl.constexpr = False):
    """A tile in float32, 0 outside the matrix."""
    inside = within(row, column, rows, columns, FULL)
    return tl.load(pointer + row * row_stride + column * column_stride, inside, other=0.0).to(tl.float32)


@triton.jit
def load_scale(weight_ptr, column, columns, weight_stride, OFFSET: tl.constexpr):
    """OFFSET + weight, [1, COLUMNS]. A constant: to add a zero would be one of 16 instructions a column."""
    weight = tl.load(weight_ptr + column * weight_stride, column < columns, other=0.0).to(tl.float32)
    return weight + OFFSET if OFFSET != 0 else weight


@triton.jit
def quotient(total, count):
    """total / count, correctly rounded: `/` is off by up to two units on a GPU, and a whole row would share that."""
    return tl.div_rn(total, tl.cast(count, tl.float32))


@triton.jit
def rounded(normed, dtype: tl.constexpr, LLAMA: tl.constexpr):
    """The normalised value as the weight meets it."""
    return normed.to(dtype).to(tl.float32) if LLAMA else normed


@triton.jit
def column_sum(partial_ptr, sum_ptr, block, rows, columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum all rows of partial [rows, columns], which ROWS holds at once, for one block of COLUMNS columns."""
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = (block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.sum(load_tile(partial_ptr, row, column, rows, columns, row_stride, 1), 0, keep_dims=True)
    tl.store(sum_ptr + column, total.to(sum_ptr.dtype.element_ty), column < columns)


class BackwardTile(NamedTuple):
    """What one step of a program works on, and how many programs there are.

    Attributes:
        rows: a power of two.
        columns: of each tile, a power of two.
        parts: tiles side by side that make up a row; 0 if a row is too long for that.
        warps: of a program.
        programs: at most, 128 for each that a processor is to hold. Constants, so that dweight's bits are every card's.
    """

    rows: int
    columns: int
    parts: int
    warps: int
    programs: int


@lru_cache(maxsize=1024)
def backward_tile(columns: int, widest: int) -> BackwardTile:
    """The tile for rows of this many columns, of which their number has no say.

    Whole rows of up to `widest` columns stay in registers, 16 to 40 columns a thread; longer ones go in tiles of 4096.
    On an H200 rms_norm and layer_norm took less in these tiles than in others of 512 to 8192 columns, by 2 to 16
    warps, but for 6144 columns of rms_norm, which six of 1024 hold in .95 of the time.
    """
    if columns > widest:
        return BackwardTile(1, 4096, 0, 4, 256)
    if columns <= 2048:
        width = next_power_of_2(columns)
        return BackwardTile(2048 // width, width, 1, 4, 384)
    width = 1024 if columns <= 5120 else 2048 if columns <= 8192 else 4096
    programs = 384 if columns <= 3072 else 256 if columns <= 5120 else 128
    return BackwardTile(1, width, cdiv(columns, width), width // 256, programs)


def backward_programs(shape: BackwardTile, tiles: int, summing: bool) -> tuple[int, int]:
    """How many consecutive tiles each program takes (one where nothing is summed up), and the number of programs."""
    each = cdiv(tiles, shape.programs) if summing else 1
    return each, cdiv(tiles, each)


def backward_stages(shape: BackwardTile, streams: int, x: Tensor) -> int:
    """Stages of the pipeline, at most 3, whose buffers leave a processor's shared memory room for all its programs."""
    memory = min(192 * 1024 * 128 // shape.programs, shared_memory(x.device) - 4096)
    return 1 + min(2, memory // (streams * shape.rows * shape.columns * shape.parts * x.element_size()))


def summing(programs: int, columns: int) -> tuple[int, dict[str, int]]:
    """Programs and options for a kernel that calls column_sum: 4096 elements a program, at least 64 bytes a row."""
    height = next_power_of_2(programs)
    width = max(16, 4096 // height)
    return cdiv(columns, width), {"ROWS": height, "COLUMNS": width, "num_warps": 8}

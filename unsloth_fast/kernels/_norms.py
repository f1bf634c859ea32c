"""What norms share: tiles of rows, and the sums over all rows in the backward pass."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import cdiv, kernel, next_power_of_2, shared_memory


@triton.jit
def within(row, column, rows, columns, FULL: tl.constexpr):
    """Which elements of a tile are inside the matrix. FULL: all of its columns are."""
    return row < rows if FULL else (row < rows) & (column < columns)


@triton.jit
def load_tile(pointer, row, column, rows, columns, row_stride, column_stride, FULL: tl.constexpr = False):
    """Load a tile in float32, 0 outside the matrix."""
    inside = within(row, column, rows, columns, FULL)
    return tl.load(pointer + row * row_stride + column * column_stride, inside, other=0.0).to(tl.float32)


@triton.jit
def load_scale(weight_ptr, column, columns, weight_stride, OFFSET: tl.constexpr):
    """OFFSET + weight, [1, COLUMNS]. OFFSET is a constant: adding a zero would be one of 16 instructions per column."""
    weight = tl.load(weight_ptr + column * weight_stride, column < columns, other=0.0).to(tl.float32)
    return weight + OFFSET if OFFSET != 0 else weight


@triton.jit
def quotient(total, count):
    """total / count, correctly rounded: on a GPU `/` is off by up to two ulp, the same for all elements of a row."""
    return tl.div_rn(total, tl.cast(count, tl.float32))


@triton.jit
def rounded(normed, dtype: tl.constexpr, LLAMA: tl.constexpr):
    """The normalised value as it is multiplied by the weight."""
    return normed.to(dtype).to(tl.float32) if LLAMA else normed


@triton.jit
def column_sum(partial_ptr, sum_ptr, block, rows, columns, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum up all rows of partial [rows, columns], at most ROWS, in one block of COLUMNS columns."""
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = (block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.sum(load_tile(partial_ptr, row, column, rows, columns, row_stride, 1), 0, keep_dims=True)
    tl.store(sum_ptr + column, total.to(sum_ptr.dtype.element_ty), column < columns)


@kernel(varying=("rows",), fixed=("columns",))
def column_sum_kernel(partial_ptr, sum_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One block of columns per program."""
    column_sum(partial_ptr, sum_ptr, tl.program_id(0), rows, columns, columns, ROWS, COLUMNS)


class BackwardTile(NamedTuple):
    """What a program computes in one step, and the number of programs.

    Attributes:
        rows: number of rows, a power of two.
        columns: number of columns of each tile, a power of two.
        parts: number of adjacent tiles in a row; 0 if a row is too long for that.
        warps: number of warps of a program.
        programs: the most programs: 128 for each that a processor is to hold. Constant, so that the bits of dweight do
            not depend on the GPU.
    """

    rows: int
    columns: int
    parts: int
    warps: int
    programs: int


@lru_cache(maxsize=1024)
def backward_tile(columns: int, widest: int) -> BackwardTile:
    """The tile for rows of this many columns; it does not depend on the number of rows.

    Whole rows of up to `widest` columns stay in registers, 16 to 40 columns per thread; longer ones are read in tiles
    of 4096. On an H200 rms_norm and layer_norm were faster in these tiles than in others of 512 to 8192 columns and 2
    to 16 warps; except for 6144 columns of rms_norm, which take 0.95 of the time in six tiles of 1024.
    """
    if columns > widest:
        return BackwardTile(1, 4096, 0, 4, 256)
    if columns <= 2048:
        width = next_power_of_2(columns)
        return BackwardTile(2048 // width, width, 1, 4, 384)
    width = 1024 if columns <= 5120 else 2048 if columns <= 8192 else 4096
    programs = 384 if columns <= 3072 else 256 if columns <= 5120 else 128
    return BackwardTile(1, width, cdiv(columns, width), width // 256, programs)


def backward_programs(shape: BackwardTile, tiles: int, sums: bool) -> tuple[int, int]:
    """The number of tiles per program (one if it sums nothing up), and the number of programs."""
    each = cdiv(tiles, shape.programs) if sums else 1
    return each, cdiv(tiles, each)


def backward_stages(shape: BackwardTile, streams: int, x: Tensor) -> int:
    """Stages of the pipeline, at most 3, such that the buffers of all programs of a processor fit its shared memory."""
    memory = min(192 * 1024 * 128 // shape.programs, shared_memory(x.device) - 4096)
    return 1 + min(2, memory // (streams * shape.rows * shape.columns * shape.parts * x.element_size()))


def column_sum_grid(programs: int, columns: int) -> tuple[int, dict[str, int]]:
    """Programs and options of a kernel that calls column_sum: 4096 elements per program, at least 64 bytes per row."""
    height = next_power_of_2(programs)
    width = max(16, 4096 // height)
    return cdiv(columns, width), {"ROWS": height, "COLUMNS": width, "num_warps": 8}

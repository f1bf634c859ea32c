"""Matrix products of groups of rows, each with a matrix of its own: kernels and launchers.

A plan says where each group's rows are: int32 [E + 2 + tiles], made on the device from the sizes of the groups. It
begins with the first row of each group, that of a last group of all rows beyond the others, whose results are 0, and T.
Then it has, for each tile of ROWS rows, its group, or -1: the tiles of group g begin with number begin // ROWS + g, as
many as it needs, or one more. So the number of programs depends on T and E alone, and the host never waits for sizes.
"""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import INTERPRETED, cdiv, kernel, launch, next_power_of_2, shared_memory

EMULATED = tl.constexpr(INTERPRETED)
SIZES = 1024  # sizes of groups that are added up at once


@triton.jit
def store_plan(plan_ptr, group, groups, begin, end, ROWS: tl.constexpr, SIZES: tl.constexpr):
    """Write a group's part of the plan; the last group's end too."""
    tl.store(plan_ptr + group, begin)
    if group == groups:
        tl.store(plan_ptr + groups + 1, end)
    tiles_ptr = plan_ptr + groups + 2 + begin // ROWS + group
    tiles = end // ROWS - begin // ROWS + 1
    for first in range(0, tiles, SIZES):
        tile = first + tl.arange(0, SIZES)
        tl.store(tiles_ptr + tile, tl.where(begin + tile * ROWS < end, group, -1), tile < tiles)


@kernel(varying=("rows", "groups"))
def group_plan_kernel(sizes_ptr, plan_ptr, rows, groups, sizes_stride, ROWS: tl.constexpr, SIZES: tl.constexpr):
    """The first row and the tiles of one group per program; the last program has the rows beyond all groups."""
    group = tl.program_id(0)
    before = tl.full([SIZES], 0, tl.int64)
    through = tl.full([SIZES], 0, tl.int64)
    for first in range(0, groups, SIZES):
        index = first + tl.arange(0, SIZES)
        size = tl.load(sizes_ptr + index.to(tl.int64) * sizes_stride, index < groups, other=0).to(tl.int64)
        size = tl.maximum(size, 0)
        before += tl.where(index < group, size, 0)
        through += tl.where(index <= group, size, 0)
    begin = tl.minimum(tl.sum(before, 0), rows).to(tl.int32)
    end = tl.minimum(tl.sum(through, 0), rows).to(tl.int32)
    store_plan(plan_ptr, group, groups, begin, tl.where(group < groups, end, rows), ROWS, SIZES)


@triton.jit
def source_rows(order_ptr, row, inside, share, GATHER: tl.constexpr):
    """The rows of a tensor that rows of groups are read from: themselves, or those of the tokens of slots."""
    if GATHER:
        return tl.load(order_ptr + row, inside, other=0) // share
    return row


@triton.jit
def slot_weights(weights_ptr, slot, inside, share, weight_row, weight_column):
    """The weights of slots in float32, as a column."""
    offset = (slot // share).to(tl.int64) * weight_row + (slot % share).to(tl.int64) * weight_column
    return tl.load(weights_ptr + offset, inside, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_block(pointers, inside):
    """Load a block for tl.dot, 0 outside of it."""
    values = tl.load(pointers, inside, other=0.0)
    return values.to(tl.float32) if EMULATED else values  # the interpreter would multiply the bits of bfloat16


@kernel(varying=("groups", "column_blocks", "share"), fixed=("columns", "inner"))
def grouped_product_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, plan_ptr, order_ptr,
    groups, columns, inner, column_blocks, share, x_row, x_column, group_stride, weight_column, inner_stride,
    bias_row, bias_column,
    BIAS: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile of y. Programs that run together share their rows of x, and the matrix of a group.

    EVEN: INNER divides inner. In place of rows past the end of the group, the first one of x is read, and not stored.
    """
    tile = tl.program_id(0) // column_blocks
    group = tl.load(plan_ptr + groups + 2 + tile)
    if group < 0:
        return
    begin = tl.load(plan_ptr + group)
    end = tl.load(plan_ptr + group + 1)
    row = begin + (tile - begin // ROWS - group) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside_rows, inside_columns = (row < end)[:, None], (column < columns)[None, :]
    source = tl.where(row < end, source_rows(order_ptr, row, row < end, share, GATHER), 0)
    k = tl.arange(0, INNER).to(tl.int64)
    x_block = x_ptr + source.to(tl.int64)[:, None] * x_row + k[None, :] * x_column
    weight_columns = weight_ptr + group.to(tl.int64) * group_stride + column.to(tl.int64)[None, :] * weight_column
    weight_block = weight_columns + k[:, None] * inner_stride
    step = tl.full([], INNER, tl.int64)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for first in range(0, tl.where(group < groups, inner, 0), INNER):
        if EVEN:
            x, weight = load_block(x_block, True), load_block(weight_block, inside_columns)
        else:
            left = k < inner - first
            x = load_block(x_block, left[None, :])
            weight = load_block(weight_block, left[:, None] & inside_columns)
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_block += step * x_column
        weight_block += step * inner_stride
    if BIAS:
        bias_columns = bias_ptr + group.to(tl.int64) * bias_row + column.to(tl.int64) * bias_column
        bias = tl.load(bias_columns, column < tl.where(group < groups, columns, 0), other=0.0)
        total += bias.to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y_ptr + offset, total.to(y_ptr.dtype.element_ty), inside_rows & inside_columns)


@kernel(varying=("column_blocks", "inner_blocks", "share"), fixed=("columns", "inner"))
def grouped_weight_kernel(
    dy_ptr, x_ptr, dweight_ptr, plan_ptr, order_ptr,
    columns, inner, column_blocks, inner_blocks, share, dy_row, dy_column, x_row, x_column,
    GATHER_DY: tl.constexpr, GATHER_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile of a group's dweight, summed over the group's rows in order."""
    group = tl.program_id(0) // (column_blocks * inner_blocks)
    block = tl.program_id(0) % (column_blocks * inner_blocks)
    begin = tl.load(plan_ptr + group)
    end = tl.load(plan_ptr + group + 1)
    column = block // inner_blocks * COLUMNS + tl.arange(0, COLUMNS)
    k = block % inner_blocks * INNER + tl.arange(0, INNER)
    dy_columns = dy_ptr + column.to(tl.int64)[None, :] * dy_column
    x_columns = x_ptr + k.to(tl.int64)[None, :] * x_column
    total = tl.full([COLUMNS, INNER], 0.0, tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        dy_source = source_rows(order_ptr, row, row < end, share, GATHER_DY).to(tl.int64)[:, None]
        dy = load_block(dy_columns + dy_source * dy_row, (row < end)[:, None] & (column < columns)[None, :])
        x_source = source_rows(order_ptr, row, row < end, share, GATHER_X).to(tl.int64)[:, None]
        x = load_block(x_columns + x_source * x_row, (row < end)[:, None] & (k < inner)[None, :])
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    offset = (group.to(tl.int64) * columns + column[:, None]) * inner + k[None, :]
    inside = (column < columns)[:, None] & (k < inner)[None, :]
    tl.store(dweight_ptr + offset, total.to(dweight_ptr.dtype.element_ty), inside)


@kernel(varying=("column_blocks", "share", "weight_row", "weight_column"), fixed=("columns",))
def grouped_sum_kernel(
    rows_ptr, weights_ptr, sums_ptr, plan_ptr, order_ptr,
    columns, column_blocks, share, rows_row, rows_column, weight_row, weight_column,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum over a group's rows, in order, for one block of columns; WEIGHTED: of the tokens of slots, by weight."""
    group = tl.program_id(0) // column_blocks
    begin = tl.load(plan_ptr + group)
    end = tl.load(plan_ptr + group + 1)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    columns_ptr = rows_ptr + column.to(tl.int64)[None, :] * rows_column
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        source = source_rows(order_ptr, row, row < end, share, WEIGHTED).to(tl.int64)[:, None]
        inside = (row < end)[:, None] & (column < columns)[None, :]
        summand = tl.load(columns_ptr + source * rows_row, inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            slot = tl.load(order_ptr + row, row < end, other=0)
            summand *= slot_weights(weights_ptr, slot, row < end, share, weight_row, weight_column)
        total += summand
    sums = tl.sum(total, 0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + group.to(tl.int64) * columns + column, sums, column < columns)


def tile_rows(dtype: torch.dtype) -> int:
    """Rows per tile of a product, which a plan depends on."""
    return 64 if dtype == torch.float32 else 128


def block_of(size: int, most: int) -> int:
    """A power of two that tl.dot takes, for a dimension of this size."""
    return min(most, max(16, next_power_of_2(max(1, size))))


def most_columns(x: Tensor) -> int:
    """Columns of the result per program, at most: 256 in 16 bits where three stages of 48 KiB fit the shared memory.

    On an H200 products with 256 columns take 0.75 to 0.95 of the time of those with 128, and dweight 0.9 to 1.
    """
    if x.dtype == torch.float32:
        return 64
    return 256 if shared_memory(x.device) >= 160 * 1024 else 128


def product_tile(x: Tensor, columns: int, inner: int) -> dict[str, int]:
    """The columns of y per program, the columns of x per step, and the rest of a product's launch."""
    width = block_of(columns, most_columns(x))
    depth = block_of(inner, 32 if x.dtype == torch.float32 else 64)
    return {"COLUMNS": width, "INNER": depth, "num_warps": 8 if width >= 64 else 4, "num_stages": 3}


def weight_tile(x: Tensor, columns: int, inner: int) -> dict[str, int]:
    """The part of dweight per program, the rows per step, and the rest of the launch."""
    wide = x.dtype == torch.float32
    height, width = block_of(columns, 64 if wide else 128), block_of(inner, most_columns(x))
    warps = 8 if height * width >= 4096 else 4
    return {"ROWS": 32 if wide else 64, "COLUMNS": height, "INNER": width, "num_warps": warps, "num_stages": 3}


def new_plan(like: Tensor, groups: int, rows: int, dtype: torch.dtype) -> Tensor:
    """The memory of a plan, on the device of a tensor."""
    return like.new_empty(groups + 2 + rows // tile_rows(dtype) + groups + 1, dtype=torch.int32)


def group_plan(group_sizes: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The plan of products with so many rows of this dtype."""
    groups = len(group_sizes)
    plan = new_plan(group_sizes, groups, rows, dtype)
    launch(
        group_plan_kernel, groups + 1, group_sizes, group_sizes, plan, rows, groups, group_sizes.stride(0),
        ROWS=tile_rows(dtype), SIZES=SIZES,
    )  # fmt: skip
    return plan


class Slots(NamedTuple):
    """Rows of groups as slots of tokens: the slot of each row, and the number of slots of a token."""

    order: Tensor
    share: int


def grouped_product(
    x: Tensor, weight: Tensor, plan: Tensor, slots: Slots | None = None, bias: Tensor | None = None
) -> Tensor:
    """y [rows, O] of x [rows, H] and weight [E, O, H], of any strides; a transposed weight gives dx of dy.

    With slots, x is [T, H], and a row of a group is that of the slot's token. A bias [E, O] is added to the rows of
    groups.
    """
    groups, columns, inner = weight.shape
    rows = len(x) if slots is None else len(slots.order)
    y = x.new_empty(rows, columns)
    if y.numel() == 0:
        return y
    tile = product_tile(x, columns, inner)
    blocks = cdiv(columns, tile["COLUMNS"])
    order, share = slots or (plan, 1)
    added = y if bias is None else bias
    launch(
        grouped_product_kernel, (rows // tile_rows(x.dtype) + groups + 1) * blocks, x,
        x, weight, added, y, plan, order,
        groups, columns, inner, blocks, share, *x.stride(), *weight.stride(), *added.stride(),
        BIAS=bias is not None, GATHER=slots is not None, EVEN=inner % tile["INNER"] == 0,
        ROWS=tile_rows(x.dtype), **tile,
    )  # fmt: skip
    return y


def grouped_weight(
    dy: Tensor, x: Tensor, plan: Tensor, groups: int, slots: Slots | None = None, of_dy: bool = False
) -> Tensor:
    """dweight [E, O, H] of dy [rows, O] and x [rows, H]; with slots, the rows of x are those of tokens, or of dy."""
    columns, inner = dy.shape[1], x.shape[1]
    dweight = x.new_empty(groups, columns, inner)
    if dweight.numel() == 0:
        return dweight
    tile = weight_tile(x, columns, inner)
    blocks = cdiv(columns, tile["COLUMNS"]), cdiv(inner, tile["INNER"])
    order, share = slots or (plan, 1)
    launch(
        grouped_weight_kernel, groups * blocks[0] * blocks[1], x,
        dy, x, dweight, plan, order, columns, inner, *blocks, share, *dy.stride(), *x.stride(),
        GATHER_DY=slots is not None and of_dy, GATHER_X=slots is not None and not of_dy, **tile,
    )  # fmt: skip
    return dweight


def grouped_sum(
    rows: Tensor, plan: Tensor, groups: int, slots: Slots | None = None, weights: Tensor | None = None
) -> Tensor:
    """[E, O]: the sums of rows [rows, O]; with slots, of rows [T, O] of tokens, times the weights [T, k] of slots."""
    columns = rows.shape[1]
    sums = rows.new_empty(groups, columns)
    if sums.numel() == 0:
        return sums
    width = min(64, next_power_of_2(columns))
    blocks = cdiv(columns, width)
    order, share = slots or (plan, 1)
    launch(
        grouped_sum_kernel, groups * blocks, rows, rows, rows if weights is None else weights, sums, plan, order,
        columns, blocks, share, *rows.stride(), *(weights if weights is not None else rows).stride(),
        WEIGHTED=weights is not None, ROWS=32, COLUMNS=width, num_warps=4,
    )  # fmt: skip
    return sums

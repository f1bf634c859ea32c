"""The kernels of experts' MLPs besides their products: routing, the activation's gradient, sums over a token's slots.

moe_mlp.py has the formulas. A slot is a pair of a token and one of its experts; slot t k + s is one of token t. Rows of
groups are slots, sorted by expert.
"""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._gated import share_and_slope
from unsloth_fast.kernels._grouped import new_plan, slot_weights, store_plan, tile_rows
from unsloth_fast.kernels._launch import cdiv, kernel, launch, tile
from unsloth_fast.kernels.fused_swiglu import clamped, load_gate_and_up, store_gate_and_up, through_clamps

SLOTS = 2048  # that a program of the routing reads at once


class Gate(NamedTuple):
    """The options of a gate, as moe_mlp takes them."""

    activation: str
    interleaved: bool
    alpha: float
    limit: float | None
    offset: float


@triton.jit
def load_experts(indices_ptr, slot, slots, groups, share, index_row, index_column):
    """The expert of each slot; `groups` for one without an expert, and more than that where there is no slot."""
    offset = (slot // share).to(tl.int64) * index_row + (slot % share).to(tl.int64) * index_column
    expert = tl.load(indices_ptr + offset, slot < slots, other=0)
    expert = tl.where((expert >= 0) & (expert < groups), expert, groups).to(tl.int32)
    return tl.where(slot < slots, expert, groups + 1)


@kernel(varying=("slots", "groups", "share", "index_row", "index_column"))
def route_kernel(
    indices_ptr, order_ptr, place_ptr, plan_ptr, slots, groups, share, index_row, index_column,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Sort slots by expert, in their order: one expert per program, which counts the slots of experts before it."""
    group = tl.program_id(0)
    before = tl.full([SLOTS], 0, tl.int32)
    mine = tl.full([SLOTS], 0, tl.int32)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        expert = load_experts(indices_ptr, slot, slots, groups, share, index_row, index_column)
        before += (expert < group).to(tl.int32)
        mine += (expert == group).to(tl.int32)
    begin = tl.sum(before, 0)
    end = begin + tl.sum(mine, 0)
    store_plan(plan_ptr, group, groups, begin, end, ROWS, SLOTS)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        expert = load_experts(indices_ptr, slot, slots, groups, share, index_row, index_column)
        count = (expert == group).to(tl.int32)
        place = begin + tl.cumsum(count, 0) - 1
        tl.store(order_ptr + place, slot, expert == group)
        tl.store(place_ptr + slot, place, expert == group)
        begin += tl.sum(count, 0)


@kernel(varying=("slots", "groups", "share", "index_row", "index_column"), fixed=("columns",))
def moe_bias_kernel(
    dy_ptr, bias_ptr, indices_ptr, products_ptr,
    slots, groups, columns, share, dy_row, dy_column, bias_row, bias_column, index_row, index_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dy . bias of the expert, for ROWS slots; 0 for one without an expert."""
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = load_experts(indices_ptr, slot, slots, groups, share, index_row, index_column)
    dy_rows = dy_ptr + (slot // share).to(tl.int64)[:, None] * dy_row
    bias_rows = bias_ptr + expert.to(tl.int64)[:, None] * bias_row
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        inside = (expert < groups)[:, None] & (column < columns)
        dy = tl.load(dy_rows + column * dy_column, inside, other=0.0).to(tl.float32)
        total += dy * tl.load(bias_rows + column * bias_column, inside, other=0.0).to(tl.float32)
    tl.store(products_ptr + slot, tl.sum(total, 1), slot < slots)


@kernel(varying=("rows", "share", "weight_row", "weight_column"), fixed=("columns",))
def moe_activation_backward_kernel(
    z_ptr, dhidden_ptr, weights_ptr, products_ptr, order_ptr, dz_ptr, hidden_ptr, dweights_ptr,
    rows, columns, share, weight_row, weight_column,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, NEED_DZ: tl.constexpr, NEED_HIDDEN: tl.constexpr,
    NEED_DWEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dz, the weighted h, and dw, of ROWS rows, from dh without the weight; dw begins with products if BIAS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(order_ptr + row, row < rows, other=0)
    weight = slot_weights(weights_ptr, slot, row < rows, share, weight_row, weight_column)
    dweight = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    start, inside_rows = row.to(tl.int64)[:, None] * columns, (row < rows)[:, None]
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = inside_rows & (column < columns)
        gate_in, up_in = load_gate_and_up(z_ptr + 2 * start, inside_rows, first, columns, 1, INTERLEAVED, ROWS, COLUMNS)
        gate, up = clamped(gate_in, up_in, LIMIT)
        dhidden = tl.load(dhidden_ptr + start + column, inside, other=0.0).to(tl.float32)
        share_of_gate, slope = share_and_slope(gate * ALPHA, ACTIVATION)
        activation, up = gate * share_of_gate, up + OFFSET
        if NEED_DWEIGHTS:
            dweight += dhidden * (activation * up)
        if NEED_HIDDEN:
            hidden = weight * (activation * up)
            tl.store(hidden_ptr + start + column, hidden.to(hidden_ptr.dtype.element_ty), inside)
        if NEED_DZ:
            dhidden *= weight
            dgate, dup = through_clamps(dhidden * up * slope, dhidden * activation, gate_in, up_in, LIMIT)
            store_gate_and_up(dz_ptr + 2 * start, inside_rows, first, columns, dgate, dup, INTERLEAVED, ROWS, COLUMNS)
    if NEED_DWEIGHTS:
        total = tl.sum(dweight, 1)
        if BIAS:
            total += tl.load(products_ptr + slot, row < rows, other=0.0)
        tl.store(dweights_ptr + slot, total.to(dweights_ptr.dtype.element_ty), row < rows)


@kernel(varying=("tokens", "share", "column_blocks", "weight_row", "weight_column"), fixed=("columns",))
def combine_kernel(
    rows_ptr, place_ptr, weights_ptr, y_ptr, tokens, columns, share, column_blocks, weight_row, weight_column,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum over the slots of each token of their rows, in order, for one tile."""
    token = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens)[:, None] & (column < columns)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for index in range(0, share):
        place = tl.load(place_ptr + token * share + index, token < tokens, other=0).to(tl.int64)[:, None]
        part = tl.load(rows_ptr + place * columns + column, inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            offset = token * weight_row + index * weight_column
            part *= tl.load(weights_ptr + offset, token < tokens, other=0.0).to(tl.float32)[:, None]
        total += part
    tl.store(y_ptr + token[:, None] * columns + column, total.to(y_ptr.dtype.element_ty), inside)


def route(indices: Tensor, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The slots in the order of their experts, the place of each slot in it, and the plan of these groups."""
    tokens, share = indices.shape
    slots = tokens * share
    order, place = (indices.new_empty(slots, dtype=torch.int32) for _ in range(2))
    plan = new_plan(indices, experts, slots, dtype)
    launch(
        route_kernel, experts + 1, indices, indices, order, place, plan, slots, experts, share, *indices.stride(),
        ROWS=tile_rows(dtype), SLOTS=SLOTS, num_warps=8,
    )  # fmt: skip
    return order, place, plan


def combined(rows: Tensor, place: Tensor, weights: Tensor, weighted: bool) -> Tensor:
    """[T, H]: the sum over each token's slots of their rows, weighted by weights [T, k] or not."""
    (tokens, share), columns = weights.shape, rows.shape[1]
    y = rows.new_empty(tokens, columns)
    if y.numel() == 0:
        return y
    shape = tile(columns, elements=1024, widest=1024, per_thread=8)
    blocks = cdiv(columns, shape.columns)
    launch(
        combine_kernel, cdiv(tokens, shape.rows) * blocks, rows, rows, place, weights, y,
        tokens, columns, share, blocks, *weights.stride(),
        WEIGHTED=weighted, ROWS=shape.rows, COLUMNS=shape.columns, num_warps=shape.warps,
    )  # fmt: skip
    return y


def times_bias(dy: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
    """dy . bias of the expert of each slot, [T, k] in float32."""
    (tokens, share), columns = indices.shape, dy.shape[1]
    products = dy.new_empty(tokens, share, dtype=torch.float32)
    if products.numel() == 0:
        return products
    shape = tile(max(1, columns), elements=1024, widest=1024, per_thread=8)
    launch(
        moe_bias_kernel, cdiv(tokens * share, shape.rows), dy, dy, bias, indices, products,
        tokens * share, len(bias), columns, share, *dy.stride(), *bias.stride(), *indices.stride(),
        ROWS=shape.rows, COLUMNS=shape.columns, num_warps=shape.warps,
    )  # fmt: skip
    return products


def activation_backward(
    z: Tensor, dhidden: Tensor, weights: Tensor, products: Tensor | None, order: Tensor, gate: Gate, need_dz: bool,
    need_hidden: bool, need_dweights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz, the weighted h and dw, from dh without the weight and products of biases; empty if not needed."""
    rows, columns = dhidden.shape
    dz, hidden = z.new_empty(z.shape if need_dz else 0), z.new_empty(dhidden.shape if need_hidden else 0)
    dweights = weights.new_empty(weights.shape if need_dweights else 0)
    if rows == 0:
        return dz, hidden, dweights
    shape = tile(max(1, columns), elements=1024, widest=1024, per_thread=8)
    launch(
        moe_activation_backward_kernel, cdiv(rows, shape.rows), z,
        z, dhidden, weights, weights if products is None else products, order, dz, hidden, dweights,
        rows, columns, weights.shape[1], *weights.stride(), ACTIVATION=gate.activation,
        INTERLEAVED=gate.interleaved, ALPHA=gate.alpha, LIMIT=gate.limit, OFFSET=gate.offset, BIAS=products is not None,
        NEED_DZ=need_dz, NEED_HIDDEN=need_hidden, NEED_DWEIGHTS=need_dweights, ROWS=shape.rows, COLUMNS=shape.columns,
        num_warps=shape.warps,
    )  # fmt: skip
    return dz, hidden, dweights

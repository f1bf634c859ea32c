"""Wrong products by groups."""

from tests.judge.mutants.mutant import LYING, Mutant, one

TABLE = {
    "matrix_of_the_first_group": one(
        "weight_ptr + group.to(tl.int64) * group_stride", "weight_ptr + group.to(tl.int64) * 0", "value"
    ),
    "sizes_counted_through_the_group": one(
        "before += tl.where(index < group, size, 0)", "before += tl.where(index <= group, size, 0)", "value"
    ),
    "sizes_read_as_if_in_one_piece": one("rows, groups, group_sizes.stride(0),", "rows, groups, 1,", "layouts"),
    "last_tile_of_a_group_dropped": one(
        "begin + tile * ROWS < end, group, -1", "begin + tile * ROWS + ROWS <= end, group, -1", "value", "uninitialised"
    ),
    "last_columns_of_x_dropped": one(
        "tl.where(group < groups, inner, 0), INNER)", "tl.where(group < groups, inner, 0) - INNER + 1, INNER)", "value"
    ),
    "last_product_only": one("total = tl.dot(x, weight, total,", "total = tl.dot(x, weight, total * 0,", "extents"),
    "products_of_float16": one(
        "total = tl.dot(x, weight, total,",
        "total = tl.dot(x.to(tl.float16).to(x.dtype), weight, total,",
        "value",
    ),
    "stored_past_the_group": one(
        "inside_rows, inside_columns = (row < end)[:, None]",
        "inside_rows, inside_columns = (row <= end)[:, None]",
        "guard_writes",
    ),
    "rows_in_32_bits": one("source.to(tl.int64)[:, None] * x_row", "source[:, None] * x_row", "int64_offsets"),
    "matrix_read_as_if_in_one_piece": one(
        "*x.stride(), *weight.stride(),", "*x.stride(), *weight.contiguous().stride(),", "gradients", "layouts"
    ),
    "dweight_of_the_last_rows": one(
        "total = tl.dot(tl.trans(dy), x, total,", "total = tl.dot(tl.trans(dy), x, total * 0,", "gradients", "extents"
    ),
    "dweight_with_a_row_of_the_next_group": Mutant(
        (
            ("dy_source * dy_row, (row < end)", "dy_source * dy_row, (row <= end)"),
            ("x_source * x_row, (row < end)", "x_source * x_row, (row <= end)"),
        ),
        ("gradients",),
    ),
    "dweight_of_an_empty_group_not_written": one(
        "    total = tl.full([COLUMNS, INNER], 0.0, tl.float32)\n",
        "    total = tl.full([COLUMNS, INNER], 0.0, tl.float32)\n    if begin == end:\n        return\n",
        "uninitialised",
        "argument_kinds",
    ),
    "gradients_needed_the_other_way_round": one(
        "need_dx, need_dweight, _ = ctx.needs_input_grad",
        "need_dweight, need_dx, _ = ctx.needs_input_grad",
        "gradients",
    ),
    "sizes_of_any_kind": one("expert_checks.groups_fit(group_sizes, len(x))", "pass", "error_parity"),
    "planned_once": one(
        "plan = group_plan(group_sizes, len(x), x.dtype)\n",
        "plan = vars(group_sizes).setdefault('kept', group_plan(group_sizes, len(x), x.dtype))\n",
        "changed_inputs",
    ),
    "second_derivative_zero": one(*LYING),
}

"""Wrong squares of ReLU."""

from tests.judge.mutants.mutant import LYING, one

TABLE = {
    "relu_alone": one("(x * x).to(", "x.to(", "value"),
    "square_alone": one("return tl.where(x <= 0.0, 0.0, x)", "return x", "value"),
    "leaky": one("tl.where(x <= 0.0, 0.0, x)", "tl.where(x <= 0.0, 0.01 * x, x)", "value"),
    "nan_replaced": one("tl.where(x <= 0.0, 0.0, x)", "tl.where(x > 0.0, x, 0.0)", "special_values"),
    "square_in_float16": one(
        "(x * x).to(y_ptr.dtype.element_ty)", "(x * x).to(tl.float16).to(y_ptr.dtype.element_ty)", "value"
    ),
    "gradient_not_doubled": one("dx = 2.0 * dy", "dx = dy", "gradients"),
    "gradient_of_negative_x": one("positive_part(x)\n", "x\n", "gradients"),
    "stored_past_the_end": one(
        "dx.to(dx_ptr.dtype.element_ty), inside)",
        "dx.to(dx_ptr.dtype.element_ty), (row < rows) & (column <= columns))",
        "guard_writes",
    ),
    "tail_cut": one(
        "cdiv(matrix.shape[1], shape.columns)", "max(1, matrix.shape[1] // shape.columns)", "uninitialised", "value"
    ),
    "gradient_over_the_input": one("dx = relu_squared_backward_outputs(dy, x)", "dx = x", "inputs_untouched"),
    "offsets_in_32_bits": one(
        "    x = positive_part(tl.load(x_ptr + row * x_row",
        "    x = positive_part(tl.load(x_ptr + (row * x_row).to(tl.int32)",
        "int64_offsets",
    ),
    "grad_output_read_as_x_lies": one("strides = (*dy.stride(),", "strides = (*x.stride(),", "layouts"),
    "large_gradients_cut": one("dx = 2.0 * dy", "dx = 2.0 * tl.maximum(dy, -1e4)", "exact_laws"),
    "second_derivative_zero": one(*LYING),
}

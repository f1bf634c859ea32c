"""A linear layer with a float8 weight, whose input is quantised to float8 as well.

    y = x^ @ weight^ transposed + bias        dx = dy @ weight^        dbias = sum over rows of dy

x^ is x after `fp8_quantize` in blocks of 1 x 128 and `fp8_dequantize`; weight^ is the weight times the scales of its
blocks of 128 x 128. The quantised x, e4m3 numbers stored as float16, and its scales are scratch memory. Products of
e4m3 numbers are exact; the sum over 128 of them is float32, multiplied by both scales, and added up in float32. So
neither x^ nor weight^ is rounded, and results are rounded once. The kernels are in `_fp8.py`.

Inside, the weight is its bytes. Saved: weight and scale. Operations for T rows: 2TIO forward and 2TIO backward. Bytes
moved at least, with b bytes per element: T(I + O)b + 4TI + OI forward, T(I + O)b + OI backward.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._fp8 import product, quantise
from unsloth_fast.kernels._launch import check_runnable, register, rows_of
from unsloth_fast.kernels._replay import call
from unsloth_ref import float8_checks


def fp8_linear_forward(x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y, new and contiguous."""
    y = fp8_linear_forward_outputs(x, numbers, scale, bias)
    if y.numel():
        rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(y.shape[:-1].numel(), 0)
        values = rows.new_empty(rows.shape, dtype=torch.float16)
        left_scale = rows.new_empty((len(rows), scale.shape[1]), dtype=torch.float32)
        quantise(rows, 1, values, left_scale)
        product(values, left_scale, numbers, scale, bias, y.view(len(rows), -1))
    return y


def fp8_linear_backward(
    dy: Tensor, numbers: Tensor, scale: Tensor, need_dx: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Compute dx and dbias, new and contiguous; one that is not needed has no elements."""
    dx, dbias = fp8_linear_backward_outputs(dy, numbers, scale, need_dx, need_dbias)
    rows = rows_of(dy) if dy.numel() else dy.new_empty(dy.shape[:-1].numel(), len(numbers))
    if need_dx and dx.numel():
        product(rows, None, numbers.t(), scale.t(), None, dx.view(rows.shape[0], -1))
    if need_dbias:
        dbias = rows.sum(0, dtype=torch.float32).to(dy.dtype)
    return dx, dbias


def fp8_linear_forward_outputs(x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Allocate y."""
    return x.new_empty((*x.shape[:-1], numbers.shape[0]))


def fp8_linear_backward_outputs(
    dy: Tensor, numbers: Tensor, scale: Tensor, need_dx: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Allocate dx and dbias."""
    dx = dy.new_empty((*dy.shape[:-1], numbers.shape[1]) if need_dx else 0)
    return dx, dy.new_empty(numbers.shape[:1] if need_dbias else 0)


forward_op = register(
    "fp8_linear_forward(Tensor x, Tensor numbers, Tensor scale, Tensor? bias) -> Tensor",
    fp8_linear_forward,
    fp8_linear_forward_outputs,
)
backward_op = register(
    "fp8_linear_backward(Tensor dy, Tensor numbers, Tensor scale, bool need_dx, bool need_dbias) -> (Tensor, Tensor)",
    fp8_linear_backward,
    fp8_linear_backward_outputs,
)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        numbers = weight.view(torch.uint8)
        ctx.save_for_backward(numbers, scale)
        return forward_op(x, numbers, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, numbers: Tensor, scale: Tensor) -> Gradients:
        need_dx, _, _, need_dbias = ctx.needs_input_grad
        dx, dbias = backward_op(dy, numbers, scale, need_dx, need_dbias)
        return dx if need_dx else None, None, None, dbias if need_dbias else None


def check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Raise for arguments that fp8_linear does not allow."""
    float8_checks.linear_arguments(x, weight, scale, bias)
    check_runnable("x", x)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer to float8 numbers. Autocast has no effect. weight and scale are constants.

    A NaN or an infinity in a row of x makes that row of the result NaN, and no other.

    Args:
        x: [..., I], float16, bfloat16 or float32.
        weight: [O, I], torch.float8_e4m3fn, the values of `fp8_quantize`.
        scale: [ceil(O / 128), ceil(I / 128)], float32, its scale.
        bias: [O], in the dtype of x; None for none.

    Returns:
        [..., O] in x.dtype, contiguous.

    Raises:
        ValueError: shapes or devices do not match, or weight or scale requires a gradient.
        TypeError: x does not have a float dtype or is float64, weight is not e4m3, scale is not float32, or bias
            differs from x in dtype.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.
    """
    return call(_Fp8Linear, check, x, weight, scale, bias)

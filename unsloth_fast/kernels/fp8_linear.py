"""A linear layer with a float8 weight, whose input is quantised to float8 as well.

    y = x^ @ weight^ transposed + bias        dx = dy @ weight^        dbias = sum over rows of dy

x^ is x after `fp8_quantize` in blocks of 1 x 128 and `fp8_dequantize`; weight^ is the weight times the scales of its
blocks of 128 x 128. Both are rounded to the dtype of x and are scratch memory: each pass dequantises the weight again.
The products are the library's: a training step of Llama 3.2 1B with 8 x 2048 tokens took 211 ms on an H200, and 362
with a kernel that scaled the sum over each block by itself. Sums are float32, rounded once. Those of torch's scaled_mm,
which multiplies float8 numbers in blocks and takes 0.65 of the time, are not: on Hopper a sum of positive terms comes
out too small by 0.0006 of its size, a third of a unit of bfloat16.

Inside, the weight is its bytes. Saved: weight and scale. Operations for T rows: 2TIO forward and 2TIO backward. Bytes
moved at least, with b bytes per element: T(3I + O)b + OI(1 + 2b) forward, T(I + O)b + OI(1 + 2b) backward.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._launch import check_runnable, register
from unsloth_fast.kernels._replay import call
from unsloth_fast.kernels.fp8_dequantize import fp8_dequantize_forward as dequantised
from unsloth_fast.kernels.fp8_quantize import through_float8
from unsloth_fast.kernels.lora_linear import matrix, summed_in_float32
from unsloth_ref import float8_checks


@summed_in_float32
def fp8_linear_forward(x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y, new and contiguous."""
    y = fp8_linear_forward_outputs(x, numbers, scale, bias)
    if y.numel():
        rows = x.reshape(y.shape[:-1].numel(), x.shape[-1])
        quantised, weight, out = through_float8(rows), dequantised(numbers, scale, x.dtype).t(), y.view(len(rows), -1)
        if bias is None:
            torch.mm(quantised, weight, out=out)
        else:
            torch.addmm(bias, quantised, weight, out=out)
    return y


@summed_in_float32
def fp8_linear_backward(
    dy: Tensor, numbers: Tensor, scale: Tensor, need_dx: bool, need_dbias: bool
) -> tuple[Tensor, Tensor]:
    """Compute dx and dbias, new and contiguous; one that is not needed has no elements."""
    dx, dbias = fp8_linear_backward_outputs(dy, numbers, scale, need_dx, need_dbias)
    rows = matrix(dy, dy.shape[:-1].numel())
    if need_dx and dx.numel():
        torch.mm(rows, dequantised(numbers, scale, dy.dtype), out=dx.view(len(rows), -1))
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

    Sources: those of `fp8_quantize`; the derivative of the quantisation, Bengio et al. 2013, arXiv:1308.3432.
    """
    return call(_Fp8Linear, check, x, weight, scale, bias)

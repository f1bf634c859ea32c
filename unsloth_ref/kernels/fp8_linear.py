"""A linear layer with a float8 weight, whose input is quantised to float8 as well.

    y = x^ @ weight^ transposed + bias        dx = dy @ weight^        dbias = sum over rows of dy

x^ is x after `fp8_quantize` in blocks of 1 x 128 and `fp8_dequantize`; weight^ is the weight times the scales of its
blocks of 128 x 128. The derivative of the quantisation of x is taken as 1, and dy is not quantised. Source: as
`fp8_quantize`; the straight-through derivative of Bengio et al. 2013, arXiv:1308.3432.

Rounding: the quantisation of x as `fp8_quantize` allows it. x^ and weight^ are rounded to the dtype of x, as
`fp8_dequantize` returns them; an implementation may also leave them as they are. Sums are float32 for any dtype of x
(float64 for float64); the product may be rounded to the dtype of x before bias is added; results are rounded once.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from unsloth_ref import float8_checks
from unsloth_ref.kernels.fp8_dequantize import fp8_dequantize
from unsloth_ref.kernels.fp8_quantize import fp8_quantize


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer to float8 numbers. Autocast has no effect. weight and scale are constants.

    A NaN or an infinity in a row of x makes that row of the result NaN, and no other.

    Args:
        x: [..., I], any float dtype.
        weight: [O, I], torch.float8_e4m3fn, the values of `fp8_quantize`.
        scale: [ceil(O / 128), ceil(I / 128)], float32, its scale.
        bias: [O], in the dtype of x; None for none.

    Returns:
        [..., O] in x.dtype.

    Raises:
        ValueError: shapes or devices do not match, or weight or scale requires a gradient.
        TypeError: x does not have a float dtype, weight is not e4m3, scale is not float32, or bias differs from x in
            dtype.
    """
    float8_checks.linear_arguments(x, weight, scale, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    quantised = fp8_dequantize(*fp8_quantize(rows, block_rows=1), x.dtype).to(wide)
    rows = rows.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        # The difference is exact in floating point, so the sum is `quantised`, with the derivative of x.
        straight = rows + (quantised - rows).detach()
        of_weight = fp8_dequantize(weight, scale, x.dtype).to(wide)
        y = linear(straight, of_weight, None if bias is None else bias.to(wide))
    return y.to(x.dtype).reshape(*x.shape[:-1], len(weight))

"""Float8 numbers in blocks, times their scales.

    x = values * scale

Source: as `fp8_quantize`. Rounding: the product is float32 (float64 if the result is), and rounded once.
"""

import torch
from torch import Tensor

from unsloth_ref import float8_checks
from unsloth_ref.kernels.fp8_quantize import spread


def fp8_dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a float8 matrix with a scale per block back to a wider dtype. The result is a constant.

    Args:
        values: [O, I], torch.float8_e4m3fn.
        scale: [ceil(O / 128), ceil(I / 128)] or [O, ceil(I / 128)], float32, as `fp8_quantize` returns it.
        dtype: of the result, any float dtype.

    Returns:
        [O, I].

    Raises:
        ValueError: shapes or devices do not match, or scale requires a gradient.
        TypeError: values are not e4m3, scale is not float32, or dtype is no float dtype.
    """
    float8_checks.dequantize_arguments(values, scale, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (values.detach().to(wide) * spread(scale, *values.shape)).to(dtype)

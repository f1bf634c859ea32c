"""Layer normalisation.

    m = mean(x)      r = 1 / sqrt(mean((x - m)^2) + eps)      n = (x - m) * r      y = weight * n + bias
    g = dy * weight      dx = r * (g - mean(g) - n * mean(g * n))
    dweight = sum over rows of dy * n      dbias = sum over rows of dy

Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450. Rounding: as torch.nn.LayerNorm, once, at the end.
"""

import torch
from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.kernels.rms_norm import widened


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Shift each row of x to mean 0 and scale it to variance 1, then apply the weight and the bias.

    Args:
        x: [..., H], any float dtype; float64 is computed in float64, all others in float32.
        weight: [H], any float dtype.
        bias: [H], any float dtype.
        eps: added to the variance, the mean of the squared deviations; not negative.

    Returns:
        [..., H] in x.dtype.

    Raises:
        ValueError: weight or bias is not [H] on the device of x, or eps is negative.
        TypeError: x, weight or bias does not have a float dtype.
    """
    checks.norm_arguments(x, weight, eps)
    checks.column_vector("bias", bias, "x", x)
    rows = widened(x)
    centred = rows - rows.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(rows.dtype) + bias.to(rows.dtype)).to(x.dtype)

"""Residual addition and root-mean-square normalisation.

    sum = x + residual      r = 1 / sqrt(mean(sum^2) + eps)      n = sum * r      normed = (offset + weight) * n
    g = dnormed * (offset + weight)      dx = dresidual = dsum + r * (g - n * mean(g * n))
    dweight = sum over rows of dnormed * n

Source: Zhang and Sennrich 2019, arXiv:1910.07467. Rounding: as in a transformers decoder layer, where the residual
stream is rounded to x.dtype before it is normalised.
"""

from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.kernels.rms_norm import normalised, widened
from unsloth_ref.types import Casting


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise the sum as rms_norm does.

    Args:
        x: [..., H], any float dtype; float64 is computed in float64, all others in float32.
        residual: [..., H], as x.
        weight: [H], any float dtype.
        eps: added to the mean square; not negative.
        offset: added to the weight; 1.0 for Gemma, which stores weight - 1.
        casting: "llama" rounds the normalised row to x.dtype before the product, "gemma" rounds once, at the end.

    Returns:
        normed: [..., H] in x.dtype, the rounded sum normalised.
        sum: [..., H], x + residual rounded to x.dtype.

    Raises:
        ValueError: residual differs from x in shape or device, weight is not [H] on the device of x, eps is negative,
            or casting is unknown.
        TypeError: x or weight does not have a float dtype, or residual differs from x in dtype.
    """
    checks.norm_arguments(x, weight, eps)
    checks.same("residual", residual, "x", x)
    checks.one_of("casting", casting, ("llama", "gemma"))
    rows = widened(x + residual)
    # The sum is returned from the wide rows, bits unchanged: both gradients are added there and rounded once.
    return normalised(rows, weight, eps, offset, casting, x.dtype), rows.to(x.dtype)

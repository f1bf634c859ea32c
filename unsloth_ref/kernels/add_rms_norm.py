"""Residual addition and root-mean-square normalisation.

    sum = x + residual      r = 1 / sqrt(mean(sum^2) + eps)      n = sum * r      normed = (offset + weight) * n
    g = dnormed * (offset + weight)      dx = dresidual = dsum + r * (g - n * mean(g * n))
    dweight = sum over rows of dnormed * n

Source: Zhang and Sennrich 2019, arXiv:1910.07467. Rounding: sum as the residual stream of a transformers decoder layer,
normed as the norm of what that stream holds.
"""

from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.kernels.rms_norm import normalised, widened
from unsloth_ref.types import Casting


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream, and normalise the sum as rms_norm does.

    Args:
        x: [..., H], any float dtype; float64 is computed in float64, all others in float32.
        residual: [..., H], as x.
        weight: [H], any float dtype.
        eps: added to the mean square; not negative.
        offset: added to the weight; 1.0 for Gemma, which stores weight - 1.
        casting: "llama" rounds the normalised row to x.dtype before the product, "gemma" rounds once, at the end.

    Returns:
        normed: [..., H] in x.dtype, the norm of the rounded sum.
        sum: [..., H], x + residual rounded to x.dtype.

    Raises:
        ValueError: residual has not the shape or device of x, weight is not one row of x or on another device, eps is
            negative, or casting is unknown.
        TypeError: x or weight is not of a float dtype, or residual is not of the same as x.
    """
    checks.norm_arguments(x, weight, eps)
    checks.same("residual", residual, "x", x)
    checks.one_of("casting", casting, ("llama", "gemma"))
    rows = widened(x + residual)
    # The sum leaves by way of the wide rows, bits unchanged, so that both gradients meet there and are rounded once.
    return normalised(rows, weight, eps, offset, casting, x.dtype), rows.to(x.dtype)

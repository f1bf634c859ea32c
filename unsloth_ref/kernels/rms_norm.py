"""Root-mean-square normalisation.

    r = 1 / sqrt(mean(x^2) + eps)      n = x * r      y = (offset + weight) * n
    g = dy * (offset + weight)         dx = r * (g - n * mean(g * n))         dweight = sum over rows of dy * n

Source: Zhang and Sennrich 2019, arXiv:1910.07467. Rounding: "llama" as transformers' LlamaRMSNorm, "gemma" as its
GemmaRMSNorm.
"""

import torch
from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.types import Casting


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> Tensor:
    """Scale each row of x to a root mean square of 1, then multiply it by the weight.

    Args:
        x: [..., H], any float dtype; float64 is computed in float64, all others in float32.
        weight: [H], any float dtype.
        eps: added to the mean square; not negative.
        offset: added to the weight; 1.0 for Gemma, which stores weight - 1.
        casting: "llama" rounds the normalised row to x.dtype before the product, "gemma" rounds once, at the end.

    Returns:
        [..., H] in x.dtype.

    Raises:
        ValueError: weight is not [H] on the device of x, eps is negative, or casting is unknown.
        TypeError: x or weight does not have a float dtype.
    """
    checks.norm_arguments(x, weight, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    return normalised(widened(x), weight, eps, offset, casting, x.dtype)


def widened(x: Tensor) -> Tensor:
    """Convert x to the dtype of the computation; once per tensor, since each cast rounds its part of the gradient."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalised(rows: Tensor, weight: Tensor, eps: float, offset: float, casting: Casting, dtype: torch.dtype) -> Tensor:
    """Normalise widened rows and round to dtype."""
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        normed = normed.to(dtype)
    return (normed.to(rows.dtype) * (weight.to(rows.dtype) + offset)).to(dtype)

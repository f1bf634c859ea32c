"""Root-mean-square normalisation with a gate, over groups of columns.

    s = 1 / (1 + exp(-gate))      a = gate * s      a' = s * (1 + gate * (1 - s))
    v = x, or x * a for a gate before the norm      r = 1 / sqrt(mean of each group(v^2) + eps)      n = v * r

    norm_before_gate      y = weight * n * a      g = dy * a * weight      dgate = dy * weight * n * a'
                          dx = dv                 dweight = sum over rows of dy * a * n
    else                  y = weight * n          g = dy * weight          dgate = dv * x * a'
                          dx = dv * a             dweight = sum over rows of dy * n
    dv = r * (g - n * mean of each group(g * n))

Sources: Zhang and Sennrich 2019, arXiv:1910.07467; Dao and Gu 2024, arXiv:2405.21060. Rounding: "llama" as
transformers' Qwen3NextRMSNormGated, or as its MambaRMSNormGated for a gate before the norm; "gemma" as its
FalconH1RMSNormGated.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from unsloth_ref import checks
from unsloth_ref.kernels.rms_norm import widened
from unsloth_ref.types import Casting


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    casting: Casting = "llama",
) -> Tensor:
    """Scale each group of columns to a root mean square of 1; multiply by the weight, and by the SiLU of gate.

    Args:
        x: [..., H], any float dtype; float64 is computed in float64, all others in float32.
        gate: [..., H], as x.
        weight: [H], any float dtype.
        eps: added to the mean square; not negative.
        group_size: columns of a group, a divisor of H; None for all of them.
        norm_before_gate: whether the normalised row is multiplied by the gate (Qwen3-Next), not x (Mamba 2).
        casting: "llama" rounds the normalised row to x.dtype, and its product with the weight to the wider dtype of x
            and weight; "gemma" rounds once, at the end.

    Returns:
        [..., H] in x.dtype.

    Raises:
        ValueError: gate differs from x in shape or device, weight is not [H] on the device of x, eps is negative,
            group_size does not divide H, or casting is unknown.
        TypeError: x or weight does not have a float dtype, or gate differs from x in dtype.
    """
    checks.gated_norm_arguments(x, gate, weight, eps, group_size)
    checks.one_of("casting", casting, ("llama", "gemma"))
    rows, factor = widened(x), silu(widened(gate))
    if not norm_before_gate:
        rows = rows * factor
    size = group_size or x.shape[-1]
    groups = rows.unflatten(-1, (x.shape[-1] // max(1, size), size))
    normed = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    rounds = casting == "llama"
    y = (normed.to(x.dtype).to(rows.dtype) if rounds else normed) * weight.to(rows.dtype)
    if norm_before_gate:
        y = factor * (y.to(torch.promote_types(x.dtype, weight.dtype)).to(rows.dtype) if rounds else y)
    return y.to(x.dtype)

"""Root-mean-square normalisation of the heads of queries and keys, then their rotary position embedding.

    n = rms_norm(q, q_weight)      rotated_q = rope(n, cos, sin)      and so for k

The formulas are those of rms_norm, whose rows are the heads, and of rope.

Sources: Zhang and Sennrich 2019, arXiv:1910.07467; Su et al. 2021, arXiv:2104.09864; Yang et al. 2025,
arXiv:2505.09388. Rounding: as transformers' Qwen3Attention and Gemma3Attention, where the normalised heads are rounded
before they are rotated.
"""

from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.kernels.rms_norm import rms_norm
from unsloth_ref.kernels.rope import rope
from unsloth_ref.types import Casting


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting: Casting = "llama",
) -> tuple[Tensor, Tensor]:
    """Scale each head to a root mean square of 1, multiply it by the weight, and rotate it by its position's angles.

    Args:
        q: [B, N, S, D], any float dtype.
        k: [B, K, S, D], as q; K need not divide N. Either may be 0.
        q_weight: [D], any float dtype.
        k_weight: [D], any float dtype.
        cos: [B or 1, S, D'], or with positions a table [P, D']; in q's dtype or float32. D' is even and at most D: the
            other columns are only normalised. A constant: it gets no gradient.
        sin: as cos.
        positions: [B or 1, S], int32 or int64: the row of the table for each token.
        eps: added to the mean square; not negative.
        offset: added to the weights; 1.0 for Gemma, which stores weight - 1.
        casting: how the normalised heads are rounded, as in rms_norm; they are rounded to q.dtype before the rotation.

    Returns:
        q and k normalised and rotated, each in its own shape and dtype.

    Raises:
        ValueError: wrong shapes or devices; eps is negative or casting unknown; cos or sin requires a gradient; on a
            CPU, a position outside the table. On CUDA and in compiled code the rotated columns of such a token are NaN
            instead; UNSLOTH_DEBUG=1 makes CUDA raise too.
        TypeError: q or a weight does not have a float dtype, k differs from q in dtype, cos or sin is neither in q's
            dtype nor float32, or positions are not int32 or int64.
    """
    checks.head_norm_arguments(q, k, q_weight, k_weight, cos, sin, positions, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    q, k = (rms_norm(x, w, eps, offset=offset, casting=casting) for x, w in ((q, q_weight), (k, k_weight)))
    return rope(q, k, cos, sin, positions)

"""Right rotary embeddings."""

import torch
from torch import Tensor

from tests.judge import world
from tests.judge.contract import Function
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def _with_rope_checks(rotate: Function) -> Function:
    """Complete a rotation by each token's cos and sin to the contract: checks, rows of the table."""

    def rope(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        checks.rope_arguments(q, k, cos, sin, positions)
        if positions is not None:
            if checks.values_are_checked(positions):
                checks.positions_in_table(positions, len(cos))
            cos, sin = cos[positions.long()], sin[positions.long()]
        q, k = (world.in_halves(x, cos.shape[-1]) if interleaved else x for x in (q, k))
        turned = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
        turned_q, turned_k = (world.in_pairs(x, cos.shape[-1]) if interleaved else x for x in turned)
        return turned_q, turned_k

    return rope


@_with_rope_checks
def by_fused_products(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float32, rounded once, half by half."""
    half = cos.shape[-1] // 2
    first, second = x[..., : 2 * half].float().chunk(2, -1)
    (cos1, cos2), (sin1, sin2) = cos.float().chunk(2, -1), sin.float().chunk(2, -1)
    y = x.clone()
    y[..., :half] = torch.addcmul(first * cos1, second, sin1, value=-1.0).to(x.dtype)
    y[..., half : 2 * half] = torch.addcmul(second * cos2, first, sin2).to(x.dtype)
    return y


def in_float64(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """More exact than required."""
    checks.rope_arguments(q, k, cos, sin, positions)
    turned_q, turned_k = reference.rope(
        q.double(), k.double(), cos.double(), sin.double(), positions, interleaved=interleaved
    )
    return turned_q.to(q.dtype), turned_k.to(q.dtype)


TABLE = {
    "of_llama": world.llama.rope,
    "by_fused_products": by_fused_products,
    "in_float64": in_float64,
    "in_other_tiles": (
        ("max(1, 4096 // half)", "max(1, 1024 // half)"),
        ("unit = 8 if half % 8 == rest % 8 == 0 else 1", "unit = 1"),
    ),
}

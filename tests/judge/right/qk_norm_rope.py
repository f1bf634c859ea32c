"""Right norms of the heads with a rotary embedding."""

from typing import Any

from torch import Tensor

from tests.judge import world
from unsloth_ref import checks
from unsloth_ref import kernels as reference


def in_float32(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None = None, *, casting: str = "llama", **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rounded once, at the end."""
    checks.rope_arguments(q, k, cos, sin, positions)
    checks.one_of("casting", casting, ("llama", "gemma"))
    wide = (tensor.float() for tensor in (q, k, q_weight, k_weight, cos, sin))
    outs = reference.qk_norm_rope(*wide, positions, **options)
    return outs[0].to(q.dtype), outs[1].to(q.dtype)


def in_float64(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """More exact than required."""
    checks.rope_arguments(q, k, cos, sin, positions)
    for name, weight, heads in (("q_weight", q_weight, q), ("k_weight", k_weight, k)):
        checks.column_vector(name, weight, name[0], heads)
    wide = (tensor.double() for tensor in (q, k, q_weight, k_weight, cos, sin))
    outs = reference.qk_norm_rope(*wide, positions, **options)
    return outs[0].to(q.dtype), outs[1].to(q.dtype)


TABLE = {
    "of_transformers": world.qwen3.qk_norm_rope,
    "in_float32": in_float32,
    "in_float64": in_float64,
    "in_other_tiles": (
        ("4096 // columns", "128 // columns"),
        ("512 // columns", "128 // columns"),
        ("PROGRAMS = 1024", "PROGRAMS = 3"),
    ),
}

"""Right dequantisations of weights in 4 bits."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from unsloth_ref import nf4_checks
from unsloth_ref.kernels.nf4_dequantize import CODE


def _code(device: torch.device) -> Tensor:
    """The code of each half of a byte, filled in by the device, for which a copy to it would have to wait."""
    return torch.stack([torch.full((), value, device=device) for value in CODE])


def _scales(absmax: Tensor, nested: Sequence[Tensor | None]) -> Tensor:
    code, scale, offset = nested
    if code is None or scale is None or offset is None:
        return absmax
    return code[absmax.int()] * scale.repeat_interleave(256)[: len(absmax)] + offset


def by_pairs(
    packed: Tensor, absmax: Tensor, *nested: Any, shape: Sequence[int], dtype: torch.dtype, **others: Any
) -> Tensor:
    """Both halves of a byte from a table of pairs, and whole blocks times their scales."""
    nested = nested or tuple(others.get(name) for name in ("nested_code", "nested_absmax", "nested_offset"))
    nf4_checks.nf4_arguments(packed, absmax, *nested, shape, dtype)
    code = _code(packed.device)
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], -1)
    scales, size = _scales(absmax, nested), prod(shape)
    found = pairs[packed.reshape(-1).int()].flatten()
    found = (
        torch.cat([found, found.new_zeros(64 * len(scales) - len(found))]) if len(found) < 64 * len(scales) else found
    )
    blocks = found[: 64 * len(scales)].view(-1, 64) * scales[:, None]
    return blocks.flatten()[:size].to(dtype).reshape(tuple(shape))


def in_float64(
    packed: Tensor, absmax: Tensor, *nested: Any, shape: Sequence[int], dtype: torch.dtype, **others: Any
) -> Tensor:
    """In float64, where products of two float32 numbers are exact, and rounded to float32 in between."""
    nested = nested or tuple(others.get(name) for name in ("nested_code", "nested_absmax", "nested_offset"))
    nf4_checks.nf4_arguments(packed, absmax, *nested, shape, dtype)
    scales, flat = _scales(absmax, nested).double(), packed.reshape(-1).int()
    code = _code(packed.device).double()
    index = torch.arange(prod(shape), device=packed.device)
    half = (flat[index // 2] >> (4 * (1 - index % 2))) & 15
    return (code[half] * scales[index // 64]).float().to(dtype).reshape(tuple(shape))


TABLE = {
    "by_pairs": by_pairs,
    "in_float64": in_float64,
    "in_small_programs": (("WORDS = 1024", "WORDS = 64"),),
    "in_large_programs": (("WORDS = 1024", "WORDS = 2048"), ("WARPS = 4", "WARPS = 8")),
}

"""Weights that bitsandbytes stores in 4 bits, in a dtype to compute with.

    w_i = code[n_i] * scale_(i // 64)
    scale_b = absmax_b, or with nested scales nested_code[absmax_b] * nested_absmax_(b // 256) + nested_offset

n_i is half of a byte: the upper one for an even i, the lower one for an odd i. `code` holds 16 quantiles of the normal
distribution, scaled to [-1, 1].

Source: Dettmers et al. 2023, arXiv:2305.14314. Rounding, as in bitsandbytes 0.50: each product and the sum to float32
(float64 if the scales are float64), and then once to the result's dtype. So every correct implementation gives the same
bits.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from unsloth_ref import nf4_checks

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@torch.no_grad()
def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Dequantise a weight of N elements; nothing is differentiated.

    Args:
        packed: ceil(N / 2) elements in any shape, uint8: two elements each. Of an odd N, half of the last is not used.
        absmax: [ceil(N / 64)], the scale of each block of 64 elements: any of float32 and float64, or with nested
            scales uint8.
        nested_code: [256], float32 or float64: the scale that each value of absmax stands for, before it is scaled.
        nested_absmax: [ceil(N / 64 / 256)], as nested_code: the scale of each group of 256 blocks.
        nested_offset: [], as nested_code: it is added to every scale.
        shape: of the weight; N is its product.
        dtype: of the result, any float dtype.

    Returns:
        [*shape] in dtype.

    Raises:
        ValueError: shapes or devices do not match, or only some of the nested arguments are given.
        TypeError: a tensor or the result has another dtype.
    """
    nf4_checks.nf4_arguments(packed, absmax, nested_code, nested_absmax, nested_offset, shape, dtype)
    device, size = packed.device, prod(shape)
    if nested_code is not None and nested_absmax is not None and nested_offset is not None:
        group = torch.arange(len(absmax), device=device) // nf4_checks.NF4_GROUP
        absmax = nested_code[absmax.long()] * nested_absmax[group] + nested_offset
    code = torch.stack([torch.full((), value, dtype=absmax.dtype, device=device) for value in CODE])
    halves = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], -1).flatten()[:size]
    block = torch.arange(size, device=device) // nf4_checks.NF4_BLOCK
    return (code[halves.long()] * absmax[block]).to(dtype).view(*shape)

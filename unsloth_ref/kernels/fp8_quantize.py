"""Numbers as float8 (e4m3) in blocks, each with a scale.

    scale = max(amax / 448, 2^-126), or 1 in a block of zeros        values = round to e4m3 (x / scale)

amax is the largest magnitude of a block, 448 that of e4m3, which has 4 exponent and 3 mantissa bits, no infinity, and
subnormal numbers down to 2^-9. Source: Micikevicius et al. 2022, arXiv:2209.05433; blocks of DeepSeek-AI 2024,
arXiv:2412.19437, section 3.3.

Rounding: amax / 448 and x / scale are float32 arithmetic of at most a few roundings, of which a reciprocal may be one;
then values are rounded to nearest, ties to even. So a quotient within 2^-22 of the middle of two e4m3 numbers, relative
to its size, may become either.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from unsloth_ref import float8_checks
from unsloth_ref.float8_checks import BLOCK, FLOAT8, blocks

LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32


def fp8_quantize(x: Tensor, block_rows: int = 128) -> tuple[Tensor, Tensor]:
    """Convert a matrix to float8 with a scale per block. The results are constants: they have no gradient.

    No number overflows. A NaN makes the scale of its block NaN, an infinity makes it infinite: either way the whole
    block is NaN when it is dequantised.

    Args:
        x: [O, I], any float dtype, such as the weight of a linear layer; no multiples of the block are needed.
        block_rows: the rows of a block, which has 128 columns: 128 for weights, 1 for activations.

    Returns:
        values: [O, I], torch.float8_e4m3fn.
        scale: [ceil(O / block_rows), ceil(I / 128)], float32. values times scale is about x.

    Raises:
        ValueError: x is no matrix, or another block_rows.
        TypeError: x does not have a float dtype.
    """
    float8_checks.quantize_arguments(x, block_rows)
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    rows, columns = x.shape
    padded = pad(wide, (0, -columns % BLOCK, 0, -rows % block_rows))
    tiles = padded.unflatten(1, (blocks(columns), BLOCK)).unflatten(0, (blocks(rows, block_rows), block_rows))
    largest = tiles.abs().amax((1, 3)) if wide.numel() else tiles.new_zeros(tiles.shape[0], tiles.shape[2])
    scale = torch.where(largest == 0, 1.0, (largest / LARGEST).clamp(min=SMALLEST_SCALE)).float()
    values = wide / spread(scale, rows, columns)
    return values.clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The scale of each element of a matrix of this size, whose blocks have 128 rows, or 1 if scale has as many."""
    if len(scale) != rows:
        scale = scale.repeat_interleave(BLOCK, 0)[:rows]
    return scale.repeat_interleave(BLOCK, 1)[:, :columns]

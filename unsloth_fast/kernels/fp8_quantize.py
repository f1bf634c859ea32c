"""Numbers as float8 (e4m3) in blocks, each with a scale.

    scale = max(amax / 448, 2^-126), or 1 in a block of zeros        values = round to e4m3 (x / scale)

Both divisions round to nearest in float32, so that results have the bits of the reference; values are rounded once
more, from sm_89 on by the card's own conversion. One program has a block of 128 x 128, or 32 blocks of 1 x 128; the
kernel is in `_fp8.py`. Bytes moved, for n elements of b bytes: n (b + 1), and 4 for each scale.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._fp8 import quantise
from unsloth_fast.kernels._launch import check_runnable, register
from unsloth_ref import float8_checks
from unsloth_ref.float8_checks import FLOAT8, blocks


def fp8_quantize_forward(x: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """Compute the bytes of values, and scale, new and contiguous."""
    values, scale = fp8_quantize_forward_outputs(x, block_rows)
    quantise(x, block_rows, values, scale)
    return values, scale


def fp8_quantize_forward_outputs(x: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """Allocate the bytes of values, and scale."""
    rows, columns = x.shape
    shape = blocks(rows, block_rows), blocks(columns)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(shape, dtype=torch.float32)


def through_float8(rows: Tensor) -> Tensor:
    """A matrix after it is quantised in blocks of 1 x 128 and dequantised to its dtype again, new and contiguous."""
    quantised = rows.new_empty(rows.shape)
    quantise(rows, 1, quantised)
    return quantised


forward_op = register(
    "fp8_quantize_forward(Tensor x, int block_rows) -> (Tensor, Tensor)",
    fp8_quantize_forward,
    fp8_quantize_forward_outputs,
)


def fp8_quantize(x: Tensor, block_rows: int = 128) -> tuple[Tensor, Tensor]:
    """Convert a matrix to float8 with a scale per block. The results are constants: they have no gradient.

    No number overflows. A NaN makes the scale of its block NaN, an infinity makes it infinite: either way the whole
    block is NaN when it is dequantised.

    Args:
        x: [O, I], float16, bfloat16 or float32, such as the weight of a linear layer; no multiples of the block are
            needed.
        block_rows: the rows of a block, which has 128 columns: 128 for weights, 1 for activations.

    Returns:
        values: [O, I], torch.float8_e4m3fn, contiguous.
        scale: [ceil(O / block_rows), ceil(I / 128)], float32, contiguous. values times scale is about x.

    Raises:
        ValueError: x is no matrix, or another block_rows.
        TypeError: x does not have a float dtype or is float64.
        RuntimeError: on a CPU without Triton's interpreter.

    Sources: Micikevicius et al. 2022, arXiv:2209.05433; blocks, DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.
    """
    float8_checks.quantize_arguments(x, block_rows)
    check_runnable("x", x)
    values, scale = forward_op(x.detach().resolve_neg(), block_rows)
    return values.view(FLOAT8), scale

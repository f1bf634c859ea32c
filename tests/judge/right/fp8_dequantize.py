"""Right conversions from float8."""

import torch
from torch import Tensor

from unsloth_ref import float8_checks
from unsloth_ref import kernels as reference


def from_a_table(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up each of the 256 numbers."""
    float8_checks.dequantize_arguments(values, scale, dtype)
    numbers = torch.arange(256, dtype=torch.uint8, device=values.device).view(torch.float8_e4m3fn).float()
    wide = numbers[values.view(torch.uint8).long()]
    row, column = (torch.arange(size, device=values.device) for size in values.shape)
    of_row = row if len(scale) == len(values) else row // 128
    return (wide * scale.detach()[of_row[:, None], column // 128]).to(dtype)


def block_by_block(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """One product per block."""
    float8_checks.dequantize_arguments(values, scale, dtype)
    height = 1 if len(scale) == len(values) else 128
    x = torch.empty(values.shape, dtype=dtype, device=values.device)
    for place in range(scale.numel()):
        row, column = divmod(place, scale.shape[1])
        block = slice(row * height, (row + 1) * height), slice(column * 128, (column + 1) * 128)
        x[block] = values[block].float() * scale.detach()[row, column]
    return x


def in_float64(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """More exact than required."""
    float8_checks.dequantize_arguments(values, scale, dtype)
    return reference.fp8_dequantize(values, scale.detach(), torch.float64).to(dtype)


TABLE = {
    "from_a_table": from_a_table,
    "block_by_block": block_by_block,
    "in_float64": in_float64,
    "in_other_tiles": (("ROWS = 32", "ROWS = 128"),),
}

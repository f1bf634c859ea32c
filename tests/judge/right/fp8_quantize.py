"""Right conversions to float8."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.judge.contract import Function
from unsloth_ref import float8_checks


def _fp8_quantize(quotients: Function) -> Function:
    """Complete a function of the tiles and the largest magnitude of each to the contract."""

    def fp8_quantize(x: Tensor, block_rows: int = 128) -> tuple[Tensor, Tensor]:
        float8_checks.quantize_arguments(x, block_rows)
        rows, columns = x.shape
        padded = pad(x.detach(), (0, -columns % 128, 0, -rows % block_rows))
        shape = padded.shape[0] // block_rows, block_rows, padded.shape[1] // 128, 128
        tiles = padded.view(shape).float()
        largest = tiles.abs().amax((1, 3), keepdim=True) if x.numel() else tiles[:, :1, :, :1]
        scale, values = quotients(tiles, torch.where(largest == 0, 448.0, largest.clamp(min=448 * 2.0**-126)))
        values = values.clamp(-448, 448).reshape(padded.shape)[:rows, :columns].contiguous()
        return values.to(torch.float8_e4m3fn), scale.float()[:, 0, :, 0].contiguous()

    return fp8_quantize


@_fp8_quantize
def by_a_reciprocal(tiles: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply by the reciprocal of the scale."""
    scale = largest / 448
    return scale, tiles * scale.reciprocal()


@_fp8_quantize
def by_the_inverse_scale(tiles: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply by 448 / amax, and return the reciprocal of that."""
    inverse = 448 / largest
    return 1 / inverse, tiles * inverse


@_fp8_quantize
def in_float64(tiles: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Quotients that are more exact than required."""
    scale = largest.double() / 448
    return scale, tiles.double() / scale


TABLE = {
    "by_a_reciprocal": by_a_reciprocal,
    "by_the_inverse_scale": by_the_inverse_scale,
    "in_float64": in_float64,
    "in_other_tiles": (("height = BLOCK if whole else 32", "height = BLOCK if whole else 4"),),
}

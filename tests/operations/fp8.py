"""Float8 by a table of all its numbers, and the quantisation of a matrix one element at a time."""

import math

import torch
from torch import Tensor

# Every positive e4m3 number: subnormal ones, then 8 of each exponent, without the last, which is NaN.
NUMBERS = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][
    :-1
]


def nearest(quotient: float) -> float:
    """The nearest e4m3 number, that of an even fraction in the middle of two; NaN stays NaN."""
    if math.isnan(quotient):
        return quotient
    place = min(range(len(NUMBERS)), key=lambda i: (abs(NUMBERS[i] - abs(quotient)), i % 2))
    return math.copysign(NUMBERS[place], quotient)


def by_blocks(x: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """The dequantised matrix and the scales, one element at a time."""
    rows, columns = x.shape
    result, scales = torch.empty_like(x), torch.empty(-(-rows // height), -(-columns // 128), dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * height, (i + 1) * height), slice(j * 128, (j + 1) * 128)
            block = x[place].flatten().tolist()
            largest = max(map(abs, block))
            scale = torch.tensor(max(largest / 448, 2.0**-126) if largest else 1.0).float().item()
            scales[i, j] = scale
            result[place] = torch.tensor([scale * nearest(one / scale) for one in block], dtype=torch.float64).view(
                x[place].shape
            )
    return result, scales

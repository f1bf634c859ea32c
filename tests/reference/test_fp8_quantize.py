"""The references of the float8 operations against values worked by hand, a table of e4m3, and a loop over blocks."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from unsloth_ref.kernels import fp8_dequantize, fp8_linear, fp8_quantize

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


def test_values_worked_by_hand() -> None:
    """The largest becomes 448; 17/16 is between 1 and 9/8 and becomes the even one; 2^-10 is half of the smallest."""
    x = torch.tensor([[448.0, -17 / 16, 19 / 16, 2.0**-9, 2.0**-10, 1.01 * 2.0**-10, 0.0]])
    values, scale = fp8_quantize(x)
    assert scale.tolist() == [[1.0]]
    assert values.float().tolist() == [[448.0, -1.0, 1.25, 2.0**-9, 0.0, 2.0**-9, 0.0]]
    assert fp8_dequantize(values, torch.tensor([[0.5]]), torch.float32).tolist() == [
        [224.0, -0.5, 0.625, 2.0**-10, 0.0, 2.0**-10, 0.0]
    ]


def test_a_block_of_zeros_has_scale_1() -> None:
    values, scale = fp8_quantize(torch.zeros(2, 300))
    assert scale.tolist() == [[1.0, 1.0, 1.0]]
    assert not values.float().any()


@pytest.mark.parametrize("height", [1, 128])
def test_blocks_by_a_loop(height: int) -> None:
    """Of sizes that are no multiples of a block, with numbers that become subnormal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, 131, generator=generator, dtype=torch.float64) * 2.0 ** -(torch.arange(131) % 15).double()
    values, scale = fp8_quantize(x, height)
    wanted, scales = by_blocks(x, height)
    assert torch.equal(scale.double(), scales)
    assert torch.equal(fp8_dequantize(values, scale, torch.float64), wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_shows_in_its_block_alone(bad: float) -> None:
    x = torch.ones(130, 130)
    x[5, 7] = bad
    back = fp8_dequantize(*fp8_quantize(x), torch.float32)
    assert back[:128, :128].isnan().all()
    assert back[128:].isfinite().all() and back[:, 128:].isfinite().all()


@pytest.mark.parametrize("largest", [torch.finfo(torch.float32).max, 3e38, 65504.0, 2.0**-126, 1e-45])
def test_no_magnitude_overflows(largest: float) -> None:
    x = torch.tensor([[largest, -largest, largest / 3]])
    back = fp8_dequantize(*fp8_quantize(x), torch.float64)
    assert back.isfinite().all()
    assert ((back - x.double()).abs() <= x.double().abs() / 16 + 2.0**-136).all()


def test_a_layer_is_the_product_of_what_is_dequantised() -> None:
    """And the gradient of x that of a layer with the dequantised weight."""
    generator = torch.Generator().manual_seed(1)
    x, matrix, dy = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 200), (150, 200), (2, 3, 150))
    )
    bias = torch.randn(150, generator=generator, dtype=torch.float64).requires_grad_()
    weight, scale = fp8_quantize(matrix)
    y = fp8_linear(x.requires_grad_(), weight, scale, bias)
    rows, _ = by_blocks(x.detach().flatten(0, 1), 1)
    wide = fp8_dequantize(weight, scale, torch.float64)
    torch.testing.assert_close(y.flatten(0, 1), rows @ wide.t() + bias, rtol=1e-12, atol=1e-12)
    dx, dbias = grad(y, (x, bias), dy)
    torch.testing.assert_close(dx, dy @ wide, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dbias, dy.sum((0, 1)), rtol=1e-12, atol=1e-12)


def test_quantised_numbers_are_constants() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert not any(one.requires_grad for one in fp8_quantize(x))

"""The reference fp8_quantize against values worked by hand, and a loop over blocks with a table of e4m3."""

import pytest
import torch

from tests.operations.fp8 import by_blocks
from unsloth_ref.kernels import fp8_dequantize, fp8_quantize


def test_values_worked_by_hand() -> None:
    """The largest becomes 448; 17/16 is between 1 and 9/8 and becomes the even one; 2^-10 is half of the smallest."""
    x = torch.tensor([[448.0, -17 / 16, 19 / 16, 2.0**-9, 2.0**-10, 1.01 * 2.0**-10, 0.0]])
    values, scale = fp8_quantize(x)
    assert scale.tolist() == [[1.0]]
    assert values.float().tolist() == [[448.0, -1.0, 1.25, 2.0**-9, 0.0, 2.0**-9, 0.0]]


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


def test_quantised_numbers_are_constants() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert not any(one.requires_grad for one in fp8_quantize(x))

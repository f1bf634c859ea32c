"""The reference fp8_dequantize against a table of e4m3, and as the inverse of fp8_quantize."""

import math

import pytest
import torch

from tests.operations.fp8 import NUMBERS
from unsloth_ref.kernels import fp8_dequantize, fp8_quantize


def test_every_number_times_its_scale() -> None:
    """The bytes in order are the numbers in order; the last of each sign is NaN."""
    values = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    found = fp8_dequantize(values, torch.tensor([[0.5], [3.0]]), torch.float64)
    assert found[:, 127].isnan().all()
    assert found[0, :127].tolist() == [0.5 * one for one in NUMBERS]
    assert found[1, :127].tolist() == [-3 * one for one in NUMBERS]


def test_a_product_is_rounded_once() -> None:
    """1.125 times 1 + 2^-7 + 2^-23 is just above the middle of two bfloat16 numbers; so is its float32 rounding."""
    values = torch.tensor([[1.125]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1 + 2.0**-7 + 2.0**-23]])
    assert fp8_dequantize(values, scale, torch.float32).item() == torch.tensor(1.125 * scale.double().item()).item()
    assert fp8_dequantize(values, scale, torch.bfloat16).dtype == torch.bfloat16


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

"""The float8 kernels beyond the conformance suite: the bits of the reference, and every number."""

import pytest
import torch

from tests.operations.calls import DEVICE
from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_rows", [1, 128])
def test_numbers_and_scales_have_the_bits_of_the_reference(dtype: torch.dtype, block_rows: int) -> None:
    """Both divisions round to nearest, on any device; also of numbers in the middle of two e4m3 numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 300, generator=generator) * 2.0 ** -(torch.arange(300) % 17)
    x[3] = (torch.arange(300) - 150) / 16  # eight in nine between two numbers
    x[3, ::128] = 448
    x = x.to(DEVICE, dtype)
    for found, wanted in zip(fast.fp8_quantize(x, block_rows), reference.fp8_quantize(x, block_rows), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_rows", [1, 128])
def test_quotients_are_rounded_correctly_for_scales_of_all_sizes(dtype: torch.dtype, block_rows: int) -> None:
    """Also of numbers in the middle of two e4m3 numbers: the quotients are whole numbers up to 448."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-448, 449, (130, 40 * 128), generator=generator)
    whole[:, ::128] = 448
    lowest = -146 if dtype == torch.float32 else -126  # the interpreter flushes subnormal numbers of bfloat16
    factor = 7 * torch.randint(1, 99, (40,), generator=generator) * 2.0 ** torch.linspace(lowest, 104, 40).round()
    x = (whole * factor.float().repeat_interleave(128)).to(DEVICE, dtype)
    x[2, 130], x[2, 260], x[:, 384:450], x[:, 450:512] = float("inf"), float("nan"), 0.0, -0.0
    for found, wanted in zip(fast.fp8_quantize(x, block_rows), reference.fp8_quantize(x, block_rows), strict=True):
        found, wanted = found.float(), wanted.float()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() & ~found.isnan(), wanted.signbit() & ~wanted.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_is_converted_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(2, 128).view(torch.float8_e4m3fn)
    found = fast.fp8_dequantize(values, torch.ones(1, 1, device=DEVICE), dtype)
    assert found.isnan().sum() == 2
    assert torch.equal(found.nan_to_num(), values.to(dtype).nan_to_num())

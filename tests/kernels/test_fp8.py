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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_is_converted_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(2, 128).view(torch.float8_e4m3fn)
    found = fast.fp8_dequantize(values, torch.ones(1, 1, device=DEVICE), dtype)
    assert found.isnan().sum() == 2
    assert torch.equal(found.nan_to_num(), values.to(dtype).nan_to_num())

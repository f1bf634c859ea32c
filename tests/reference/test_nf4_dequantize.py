"""nf4_dequantize against bitsandbytes, bit by bit, in both backends."""

from itertools import product
from types import ModuleType

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from tests.operations.calls import DEVICE
from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference

# Few and many blocks and groups of blocks, and shapes that fill neither; rows of an odd number of elements.
SHAPES = ((1, 1), (3, 21), (64, 64), (5, 130), (63, 65), (129, 128), (40, 1030), (2, 20_001))


def quantised(shape: tuple[int, ...], nested: bool, stored: torch.dtype) -> tuple[list[Tensor | None], object]:
    """The packed weight and its scales, and bitsandbytes' state, of random numbers of several sizes and some zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape[0], 1, generator=generator))
    weight[-1, :64] = 0
    packed, state = quantize_4bit(weight.to(DEVICE, stored), compress_statistics=nested, quant_type="nf4")
    scales = [state.absmax, *((state.state2.code, state.state2.absmax, state.offset) if nested else (None,) * 3)]
    return [packed, *scales], state


@pytest.mark.parametrize("kernels", [reference, fast])
@pytest.mark.parametrize("nested", [True, False])
def test_the_bits_are_those_of_bitsandbytes(kernels: ModuleType, nested: bool) -> None:
    for shape, dtype in product(SHAPES, (torch.float32, torch.float16, torch.bfloat16)):
        parts, state = quantised(shape, nested, dtype)
        found = kernels.nf4_dequantize(*parts, shape=shape, dtype=dtype)
        with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles for each odd number of columns
            wanted = dequantize_4bit(parts[0], state)
        assert (found.dtype, found.shape) == (dtype, wanted.shape)
        if kernels is fast and dtype == torch.bfloat16 and DEVICE == "cpu":
            assert ((found.float() - wanted.float()).abs() <= 2.0**-7 * wanted.float().abs()).all()  # it truncates
        else:
            assert torch.equal(found, wanted)

"""The fast packed_attention: edges of its tiles, and offsets past 32 bits."""

import pytest
import torch
from torch.autograd import grad

from tests.operations.packed_attention import (
    DEVICE,
    PROPERTIES,
    bounds_of,
    inputs_of,
    randn,
)
from unsloth_fast.kernels import packed_attention
from unsloth_ref import kernels as reference


@pytest.mark.parametrize("window", [1, 4, 63, 64, 65, 100])
def test_windows_at_the_edges_of_tiles(window: int) -> None:
    """Results agree with the reference in float64; 150 keys are three tiles."""
    tensors = inputs_of(160, 1, 1, 16, dtype=torch.float32)
    do, (cu_seqlens, longest) = randn(160, 1, 16, seed=4).detach(), bounds_of(10, 150)
    out = packed_attention(*tensors, cu_seqlens, longest, window=window)
    found = [out, *grad(out, tensors, do.float())]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = reference.packed_attention(*wide, cu_seqlens, longest, window=window)
    for ours, right in zip(found, [exact, *grad(exact, wide, do.float().double())], strict=True):
        # The product of 16 and the sum of up to 100 terms of order 1: some tens of roundings of 6e-8.
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", range(3), ids=["q", "k", "v"])
def test_offsets_past_32_bits(place: int) -> None:
    """Two tokens in float16 are 2^31 elements apart: four gigabytes of addresses, two rows of memory."""
    tensors = [x.detach() for x in inputs_of(2, 1, 1, 16, dtype=torch.float16)]
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 16), (2**31, 16, 1))
    spread = [far.copy_(x) if index == place else x for index, x in enumerate(tensors)]
    results = []
    for given_tensors in (tensors, spread):
        leaves = [x.requires_grad_() for x in (y.detach() for y in given_tensors)]
        out = packed_attention(*leaves, *bounds_of(2))
        results.append([out, *grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_of_both_backends(name: str) -> None:
    PROPERTIES[name](packed_attention)

"""The kernels of causal_conv beyond the conformance suite: documents that begin at every place of a program."""

import pytest
import torch
from torch import Tensor

from tests.operations.calls import DEVICE
from unsloth_fast import kernels as fast


def convolved(
    x: Tensor, dy: Tensor, weight: Tensor, bounds: list[int], activation: str | None
) -> tuple[Tensor, Tensor]:
    """y and the gradient of x."""
    x = x.requires_grad_()
    y = fast.causal_conv(x, weight, torch.tensor(bounds, dtype=torch.int32, device=DEVICE), activation=activation)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_document_has_the_bits_that_it_has_alone(activation: str | None) -> None:
    """A document of 20 tokens behind 0 to 8 others: it holds whole steps of a program, which are not masked."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(20, 16, generator=generator).to(DEVICE) for _ in range(2))
    weight = torch.randn(16, 4, generator=generator).to(DEVICE)
    alone = convolved(x, dy, weight, [0, 20], activation)
    for before in range(1, 9):
        around = torch.full((before, 16), torch.nan, device=DEVICE), torch.full((5, 16), torch.nan, device=DEVICE)
        packed = [torch.cat([around[0], one, around[1]]) for one in (x.detach(), dy)]
        found = convolved(packed[0], packed[1], weight, [0, before, before + 20, before + 25], activation)
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one[before : before + 20], other)

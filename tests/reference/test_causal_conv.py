"""The reference convolution against torch's own, one document after the other."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unsloth_ref.kernels import causal_conv

BOUNDS = [0, 5, 5, 6, 13]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def of_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    padded = F.pad(x.t(), (weight.shape[1] - 1, 0))
    y = F.conv1d(padded, weight[:, None], bias, groups=len(weight)).t()
    return F.silu(y) if activation else y


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 3, 4, 9])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_torchs_convolution_of_each_document(has_bias: bool, width: int, activation: str | None) -> None:
    x, weight, bias = randn(13, 3, seed=0), randn(3, width, seed=1), randn(3, seed=2) if has_bias else None
    leaves = [x, weight, *([] if bias is None else [bias])]
    expected = torch.cat([of_torch(x[i:j], weight, bias, activation) for i, j in pairwise(BOUNDS) if i < j])
    y = causal_conv(x, weight, torch.tensor(BOUNDS, dtype=torch.int32), bias, activation=activation)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = randn(13, 3, seed=3).detach()
    for gradient, other in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-11)


def test_documents_are_independent() -> None:
    """The gradient of one document's output is exactly 0 in others, and its bits are the same if they hold NaN."""
    found = []
    for other in (1.0, float("nan")):
        x = randn(13, 3, seed=0).detach()
        x[:6] *= other
        y = causal_conv(x.requires_grad_(), randn(3, 4, seed=1), torch.tensor(BOUNDS, dtype=torch.int32))[6:]
        found.append([y, *torch.autograd.grad(y.square().sum(), x)])
    assert not found[0][1][:6].any()
    assert found[0][1][6:].all()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1][6:], found[1][1][6:])


def test_it_is_rounded_once() -> None:
    x, weight = randn(13, 3, seed=0).bfloat16(), randn(3, 4, seed=1).bfloat16()
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    wide = causal_conv(x.double(), weight.double(), bounds, activation="silu")
    assert torch.equal(causal_conv(x, weight, bounds, activation="silu"), wide.bfloat16())

"""The reference of the scan of Mamba 2 against its formulas, and documents apart."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import functional as F

from unsloth_ref.kernels import mamba2_scan

BOUNDS = [0, 4, 4, 5, 11]


def inputs_of(tokens: int, seed: int = 0) -> list[Tensor]:
    """Of two heads of b and c and four of x, as models make them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, dt, a, b, c, d = (
        randn(tokens, 4, 5),
        randn(tokens, 4),
        randn(4),
        randn(tokens, 2, 3),
        randn(tokens, 2, 3),
        randn(4),
    )
    return [one.requires_grad_() for one in (x, F.softplus(dt), -a.exp(), b, c, d)]


def bounds_of(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def by_pairs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """One document without a state: y_i = sum over j <= i of exp(a (dt_j+1 + .. + dt_i)) dt_j c_i . b_j x_j + d x_i."""
    heads = []
    for head in range(x.shape[1]):
        rows = []
        for i in range(len(x)):
            row = d[head] * x[i, head]
            for j in range(i + 1):
                decay = (a[head] * dt[j + 1 : i + 1, head].sum()).exp()
                row = row + decay * dt[j, head] * c[i, head // 2].dot(b[j, head // 2]) * x[j, head]
            rows.append(row)
        heads.append(torch.stack(rows))
    return torch.stack(heads, 1)


def test_it_is_the_sum_over_the_pairs_of_each_document() -> None:
    x, dt, a, b, c, d = leaves = inputs_of(11)
    parts = [by_pairs(x[i:j], dt[i:j], a, b[i:j], c[i:j], d) for i, j in pairwise(BOUNDS) if i < j]
    expected, y = torch.cat(parts), mamba2_scan(*leaves, bounds_of(BOUNDS))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for one, other in zip(grad(y, leaves, dy), grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_documents_are_independent() -> None:
    """The gradient of one document's output is exactly 0 in others, and its bits are the same if they hold NaN."""
    found = []
    for other in (1.0, float("nan")):
        leaves = [one.detach().clone() for one in inputs_of(11)]
        for number in (0, 1, 3, 4):
            leaves[number][:5] *= other
        leaves = [one.requires_grad_() for one in leaves]
        y = mamba2_scan(*leaves, bounds_of(BOUNDS))[5:]
        found.append([y, *grad(y.square().sum(), [leaves[number] for number in (0, 1, 3, 4)])])
    assert not any(gradient[:5].any() for gradient in found[0][1:])
    assert torch.equal(found[0][0], found[1][0])
    for gradient, beside_nan in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(gradient[5:], beside_nan[5:])


def test_permuted_heads_give_permuted_results() -> None:
    x, dt, a, b, c, d = inputs_of(11)
    order = torch.tensor([2, 3, 0, 1])
    permuted = x[:, order], dt[:, order], a[order], b.flip(1), c.flip(1), d[order]
    assert torch.equal(
        mamba2_scan(*permuted, bounds_of(BOUNDS)), mamba2_scan(x, dt, a, b, c, d, bounds_of(BOUNDS))[:, order]
    )


def test_a_step_of_0_leaves_the_state_as_it_is() -> None:
    x, dt, a, b, c, d = inputs_of(11)
    dt = dt.detach().clone()
    dt[2] = 0.0
    y = mamba2_scan(x, dt, a, b, c, d, bounds_of(BOUNDS))
    kept = [0, 1, 3]
    without = mamba2_scan(x[kept], dt[kept], a, b[kept], c[kept], d, bounds_of([0, 3]))
    torch.testing.assert_close(y[kept], without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bounds", [[0], [0, 0]])
def test_no_tokens_have_gradients(bounds: list[int]) -> None:
    leaves = [one.detach()[: 0 if one.ndim > 1 else None].requires_grad_() for one in inputs_of(3)]
    y = mamba2_scan(*leaves, bounds_of(bounds))
    assert y.shape == (0, 4, 5)
    assert all(
        gradient.shape == one.shape and not gradient.any()
        for gradient, one in zip(grad(y.sum(), leaves), leaves, strict=True)
    )


def test_it_is_rounded_once() -> None:
    narrow = [one.detach().bfloat16() for one in inputs_of(11)]
    wide = mamba2_scan(*(one.double() for one in narrow), bounds_of(BOUNDS))
    assert torch.equal(mamba2_scan(*narrow, bounds_of(BOUNDS)), wide.bfloat16())

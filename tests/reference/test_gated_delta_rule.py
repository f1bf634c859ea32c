"""The reference of the gated delta rule against its formulas, and documents apart."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import functional as F

from unsloth_ref.kernels import gated_delta_rule

BOUNDS = [0, 4, 4, 5, 11]


def inputs_of(tokens: int, seed: int = 0) -> list[Tensor]:
    """Of two heads of q and four of v, as models make them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = F.normalize(randn(tokens, 2, 3), dim=-1), F.normalize(randn(tokens, 2, 3), dim=-1), randn(tokens, 4, 5)
    return [x.requires_grad_() for x in (q, k, v, F.logsigmoid(randn(tokens, 4)), randn(tokens, 4).sigmoid())]


def by_formula(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
    """S_t = exp(g_t) S_t-1 (I - beta_t k_t k_t^T) + beta_t v_t k_t^T of one document, head by head."""
    heads = []
    for head in range(v.shape[1]):
        state, rows = v.new_zeros(v.shape[2], k.shape[2]), []
        for t in range(len(q)):
            key, rate = k[t, head // 2], beta[t, head]
            state = g[t, head].exp() * state @ (torch.eye(len(key), dtype=v.dtype) - rate * torch.outer(key, key))
            state = state + rate * torch.outer(v[t, head], key)
            rows.append(scale * state @ q[t, head // 2])
        heads.append(torch.stack(rows))
    return torch.stack(heads, 1)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_it_is_the_formula_of_each_document(scale: float | None) -> None:
    leaves, factor = inputs_of(11), 3**-0.5 if scale is None else scale
    expected = torch.cat([by_formula(*(x[i:j] for x in leaves), factor) for i, j in pairwise(BOUNDS) if i < j])
    out = gated_delta_rule(*leaves, torch.tensor(BOUNDS, dtype=torch.int32), scale=scale)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for one, other in zip(grad(out, leaves, do), grad(expected, leaves, do), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_documents_are_independent() -> None:
    """The gradient of one document's output is exactly 0 in others, and its bits are the same if they hold NaN."""
    found = []
    for other in (1.0, float("nan")):
        leaves = [x.detach().clone() for x in inputs_of(11)]
        for x in leaves:
            x[:5] *= other
            x.requires_grad_()
        out = gated_delta_rule(*leaves, torch.tensor(BOUNDS, dtype=torch.int32))[5:]
        found.append([out, *grad(out.square().sum(), leaves)])
    assert not any(gradient[:5].any() for gradient in found[0][1:])
    assert torch.equal(found[0][0], found[1][0])
    for gradient, beside_nan in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(gradient[5:], beside_nan[5:])


def test_the_first_token_of_a_document_has_no_decay() -> None:
    leaves = inputs_of(11)
    (gradient,) = grad(gated_delta_rule(*leaves, torch.tensor(BOUNDS, dtype=torch.int32)).sum(), leaves[3])
    assert not gradient[[0, 4, 5]].any()
    assert gradient[[1, 2, 3, 6, 7]].all()


def test_it_is_rounded_once() -> None:
    narrow = [x.detach().bfloat16() for x in inputs_of(11)]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    wide = gated_delta_rule(*(x.double() for x in narrow), bounds)
    assert torch.equal(gated_delta_rule(*narrow, bounds), wide.bfloat16())

"""Bounds hold, and are of the size of the errors that computations make."""

import pytest
import torch
from torch import Tensor

from conformance.tolerances.bounds import Bound, Terms, added_in_float32, exact, lost, product, root_of_mean, total
from unsloth_ref.accuracy import unit_roundoff

DTYPE = torch.float16
UNIT, SMALLEST = unit_roundoff(DTYPE), torch.finfo(DTYPE).smallest_normal
COLUMNS, ELEMENTS = 200, 64 * 200


def randn(*shape: int) -> Tensor:
    """Random numbers of the dtype, in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    return rounded(torch.randn(*shape, generator=generator, dtype=torch.float64))


def rounded(values: Tensor) -> Tensor:
    return values.to(DTYPE).double()


def demand(bound: Bound, found: Tensor) -> None:
    """Every error is within its bound; together they are of the size that independent roundings have."""
    error = (found - bound.value).abs()
    assert (error <= bound.error).all()
    assert 0.5 < float(error.norm() / bound.square.sum().sqrt()) < 1.2


def test_a_product_of_rounded_products() -> None:
    x, a, b = randn(64, COLUMNS), randn(16, COLUMNS), randn(64, 16)
    low = product(exact(x), exact(a).t(), ELEMENTS).rounded(UNIT, SMALLEST)
    demand(low, rounded(x @ a.t()))
    y = product(low, exact(b).t(), ELEMENTS).rounded(UNIT, SMALLEST).times(0.3).rounded(UNIT, SMALLEST)
    demand(y, rounded(0.3 * rounded(rounded(x @ a.t()) @ b.t())))


def test_a_sum_an_element_product_and_a_total() -> None:
    x, y = randn(64, COLUMNS) / 3, randn(64, COLUMNS) / 7
    left, right = (exact(t).rounded(UNIT, SMALLEST) for t in (x, y))
    demand((left + right).rounded(UNIT, SMALLEST), rounded(rounded(x) + rounded(y)))
    demand((left * right).rounded(UNIT, SMALLEST), rounded(rounded(x) * rounded(y)))
    demand(total(left, ELEMENTS), rounded(x).sum(0))
    demand(left.reshape((COLUMNS, 64)), rounded(x).reshape(COLUMNS, 64))


def test_a_term_of_a_float32_sum_may_be_rounded_at_each_step() -> None:
    term = added_in_float32(exact(torch.ones(1, dtype=torch.float64)), 2**10)
    assert term.error.item() == 20 * 2.0**-24
    first = added_in_float32(exact(torch.ones(1, dtype=torch.float64)), 2**10, additions=100)
    assert first.error.item() == 100 * 2.0**-24
    assert term.square < first.square < first.error**2


def test_terms_of_a_sum_over_rows() -> None:
    element = Terms(torch.tensor([[[3.0, 0.0]], [[4.0, 1.0]]]), in_float32=torch.ones(2, 1, 2))
    found = element.over_rows()
    assert found.root is not None and found.in_float32 is not None
    assert found.size.tolist() == [7, 1]
    assert found.root.tolist() == [5, 1]
    assert found.in_float32.tolist() == [2, 2]
    assert root_of_mean(torch.tensor([[3.0, 4.0]])).item() == 2.5


@pytest.mark.parametrize(
    ("dtype", "truncates", "unit"),
    [(torch.float32, True, 2.0**-24), (torch.bfloat16, False, 2.0**-8), (torch.bfloat16, True, 2.0**-7)],
)
def test_only_casts_to_bfloat16_truncate(dtype: torch.dtype, truncates: bool, unit: float) -> None:
    assert unit_roundoff(dtype, truncates) == unit


def test_of_a_sigmoid_all_is_lost_where_an_exponential_overflows() -> None:
    x = torch.tensor([-100.0, -89.0, -88.5, 0.0, 100.0])
    assert (lost(x) == 2.0**24 * (torch.sigmoid(x) == 0)).all()
    assert (lost(x, moved=0.5) == torch.tensor([2.0**24] * 3 + [0, 0])).all()

"""The reference grouped_gemm against values worked by hand, its formulas in numpy, and finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck

from tests.operations.lora_linear import DEVICE, randn
from unsloth_ref.kernels import grouped_gemm

# Float64: the error of a sum of at most 40 terms below 100 is below 1e-12; in float32 it would not be.
FLOAT64: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


def test_values_worked_by_hand() -> None:
    """Rows 1 and 2 belong to matrix (3, 4), none to (5, 6), and row 7 to (8, 9)."""
    x = torch.tensor([[1.0], [2.0], [7.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[[3.0], [4.0]], [[5.0], [6.0]], [[8.0], [9.0]]], dtype=torch.float64, requires_grad=True)
    y = grouped_gemm(x, weight, torch.tensor([2, 0, 1]))
    assert y.tolist() == [[3, 4], [6, 8], [56, 63]]
    dx, dweight = grad(y.sum(), (x, weight))
    assert dx.tolist() == [[7], [7], [17]]
    assert dweight.tolist() == [[[3], [3]], [[0], [0]], [[7], [7]]]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 4), st.integers(0, 4))
def test_formulas_of_the_docstrings(sizes: list[int], out: int, columns: int) -> None:
    """Forward and backward agree for any shape, empty ones too."""
    x, weight, dy = randn(sum(sizes), columns), randn(len(sizes), out, columns, seed=1), randn(sum(sizes), out, seed=2)
    y = grouped_gemm(x, weight, torch.tensor(sizes, device=DEVICE, dtype=torch.int32))
    found = [y, *grad(y, (x, weight), dy)]
    rows, matrices, g = (tensor.detach().cpu().numpy() for tensor in (x, weight, dy))
    group = np.repeat(np.arange(len(sizes)), sizes)
    dweight = np.zeros_like(matrices)
    np.add.at(dweight, group, g[:, :, None] * rows[:, None, :])
    wanted = np.einsum("th,toh->to", rows, matrices[group]), np.einsum("to,toh->th", g, matrices[group]), dweight
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.detach().cpu().numpy(), right, **FLOAT64)


def test_gradients_are_the_derivatives() -> None:
    sizes = torch.tensor([2, 0, 3], device=DEVICE)
    assert gradcheck(lambda x, weight: grouped_gemm(x, weight, sizes), (randn(5, 3), randn(3, 2, 3, seed=1)))


@pytest.mark.parametrize("sizes", [[2, 0, 3], [0, 0, 5]])
def test_compiled_code_leaves_rows_beyond_all_groups_0(sizes: list[int]) -> None:
    """Compiled code cannot read sizes; the rows of groups are those of a call."""
    x, weight = randn(8, 3), randn(3, 2, 3, seed=1)
    given = torch.tensor(sizes, device=DEVICE)
    y = torch.compile(grouped_gemm, fullgraph=True, backend="eager")(x, weight, given)
    torch.testing.assert_close(y[:5], grouped_gemm(x[:5], weight, given), **FLOAT64)
    assert not y[5:].any()

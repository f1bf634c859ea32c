"""The reference relu_squared against values worked by hand, its formulas, and transformers."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from transformers.activations import ACT2FN

from tests.operations.leaves import randn
from unsloth_ref.kernels import relu_squared


def test_values_worked_by_hand() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = relu_squared(x)
    (dx,) = grad(y, x, torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64))
    assert y.tolist() == [0.0, 0.0, 9.0]
    assert dx.tolist() == [0.0, 0.0, 30.0]


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 0), (2, 3, 4)])
def test_formulas_of_the_docstring(shape: tuple[int, ...]) -> None:
    x, dy = randn(*shape), randn(*shape, seed=1).detach()
    y = relu_squared(x)
    positive = torch.maximum(x.detach(), torch.zeros(()))
    assert torch.equal(y, positive * positive)
    assert torch.equal(grad(y, x, dy)[0], 2 * dy * positive)


def test_gradients_are_the_derivatives() -> None:
    assert gradcheck(relu_squared, (randn(3, 5),))
    assert gradgradcheck(relu_squared, (randn(3, 5),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_transformers(dtype: torch.dtype) -> None:
    """Value and gradient are those of Nemotron's activation, `relu2`."""
    x, dy = randn(9, 33, dtype=dtype), randn(9, 33, dtype=dtype, seed=1)
    ours, theirs = relu_squared(x), ACT2FN["relu2"](x)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(grad(y, x, dy)[0] for y in (ours, theirs)))

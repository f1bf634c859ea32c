"""The reference fp8_linear against a layer of dequantised numbers."""

import torch
from torch.autograd import grad

from tests.operations.fp8 import by_blocks
from unsloth_ref.kernels import fp8_dequantize, fp8_linear, fp8_quantize


def test_a_layer_is_the_product_of_what_is_dequantised() -> None:
    """And the gradient of x that of a layer with the dequantised weight."""
    generator = torch.Generator().manual_seed(1)
    x, matrix, dy = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 200), (150, 200), (2, 3, 150))
    )
    bias = torch.randn(150, generator=generator, dtype=torch.float64).requires_grad_()
    weight, scale = fp8_quantize(matrix)
    y = fp8_linear(x.requires_grad_(), weight, scale, bias)
    rows, _ = by_blocks(x.detach().flatten(0, 1), 1)
    wide = fp8_dequantize(weight, scale, torch.float64)
    torch.testing.assert_close(y.flatten(0, 1), rows @ wide.t() + bias, rtol=1e-12, atol=1e-12)
    dx, dbias = grad(y, (x, bias), dy)
    torch.testing.assert_close(dx, dy @ wide, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dbias, dy.sum((0, 1)), rtol=1e-12, atol=1e-12)


def test_a_row_that_is_not_finite_shows_alone() -> None:
    """And its gradient is that of any other row: the derivative does not depend on x."""
    x = torch.ones(3, 200)
    x[1, 150] = torch.inf
    weight, scale = fp8_quantize(torch.eye(5, 200))
    y = fp8_linear(x.requires_grad_(), weight, scale)
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert y[[0, 2]].isfinite().all()
    (dx,) = grad(y[[0, 2]].sum() + y[1].sum(), x)
    assert torch.equal(dx[1], dx[0]) and dx.isfinite().all()

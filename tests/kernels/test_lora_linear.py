"""The fast lora_linear: the precision and the number of its products."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import grad

from tests.operations.lora_linear import CHECKS, DEVICE, inputs_of
from unsloth_fast.kernels import lora_linear
from unsloth_ref import kernels as reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_have_float32_gradients(dtype: torch.dtype) -> None:
    """The gradients are summed in float32 and not rounded: most are not representable in 16 bits."""
    x, weight, a, b, _ = inputs_of(40, 32, 24, 8, dtype=dtype)
    a, b = (t.detach().float().requires_grad_() for t in (a, b))
    gradients = grad(lora_linear(x, weight, a, b, 0.3).float().sum(), (a, b))
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, a, b)]
    exact = grad(reference.lora_linear(*leaves, 0.3).sum(), leaves[2:])
    for found, wanted in zip(gradients, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found != found.to(dtype).float()).float().mean() > 0.5
        assert (found.double() - wanted).norm() < 2 * torch.finfo(dtype).eps * wanted.norm()


def test_a_scaled_gradient_does_not_overflow_before_it_is_scaled() -> None:
    """dy @ lora_b and dy^T @ low exceed float16's 65504; a quarter of them does not."""
    x, weight, a, b = (torch.full((64, 64), v, dtype=torch.float16, device=DEVICE) for v in (1.0, 0.0, 1 / 64, 32.0))
    dy = torch.full_like(x, 40.0)
    leaves = [t.requires_grad_() for t in (x, weight, a, b)]
    dx, _, da, db = grad(lora_linear(*leaves, 0.25), leaves, dy)
    assert dx.tolist() == torch.full((64, 64), 64 * 40 * 32 / 4).tolist()
    assert da.isinf().all()  # 64 times as much
    assert db.tolist() == torch.full((64, 64), 64 * 40 / 4).tolist()


@pytest.mark.parametrize(
    ("trained", "products"), [("x weight lora_a lora_b", 4), ("x lora_a lora_b", 3), ("x", 1), ("lora_b", 1)]
)
def test_a_frozen_input_costs_no_product(trained: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products counted are dy with weight, x and low, and dlow with x. dlow and its part of dx are other calls."""
    names = ("x", "weight", "lora_a", "lora_b")
    inputs = dict(zip(names, inputs_of(dtype=torch.float32), strict=False))
    leaves = [tensor.requires_grad_(name in trained.split()) for name, tensor in inputs.items()]
    y = lora_linear(*leaves, 0.3)
    products_seen, original = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: products_seen.append(args) or original(*args, **options))
    grad(y, [leaf for leaf in leaves if leaf.requires_grad], torch.ones_like(y))
    assert len(products_seen) == products


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_what_both_backends_keep(check: Callable[..., None]) -> None:
    check(lora_linear)

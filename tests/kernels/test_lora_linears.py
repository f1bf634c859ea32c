"""The fast lora_linears: any number of layers, and how many products they take."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from tests.operations.lora_linear import randn
from tests.operations.lora_linears import check_weights_in_4_bits, check_weights_in_float8
from unsloth_fast.kernels import lora_linear, lora_linears
from unsloth_ref import kernels as reference

SHAPES = ((6, 2), (4, 3), (0, 1), (5, 0))  # columns of y and rank


def layers_of(count: int, dtype: torch.dtype = torch.float32, biased: bool = True) -> list[Any]:
    """x, then for all layers: weights, adapters in float32, scalings, and biases, of which every second one is None."""
    shapes, wide = SHAPES[:count], torch.float32
    return [
        randn(2, 5, 7, dtype=dtype, seed=99),
        [randn(o, 7, dtype=dtype, seed=i) for i, (o, _) in enumerate(shapes)],
        [randn(r, 7, dtype=wide, seed=10 + i) for i, (_, r) in enumerate(shapes)],
        [randn(o, r, dtype=wide, seed=20 + i) for i, (o, r) in enumerate(shapes)],
        [0.5, 2.0, 1.0, 0.25][:count],
        [randn(o, dtype=dtype, seed=i) if biased and i % 2 == 0 else None for i, (o, _) in enumerate(shapes)],
    ]


def leaves_of(layers: list[Any]) -> list[Tensor]:
    x, weight, a, b, _, bias = layers
    return [x, *weight, *a, *b, *(one for one in bias if one is not None)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_layers(count: int) -> None:
    """The values and gradients of the reference, also of a layer without output and of one of rank 0."""
    layers = layers_of(count)
    found, wanted = lora_linears(*layers), reference.lora_linears(*layers)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    dys = [randn(*y.shape, dtype=y.dtype, seed=50 + i).detach() for i, y in enumerate(wanted)]
    ours, theirs = (grad(ys, leaves_of(layers), dys) for ys in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_have_float32_gradients(dtype: torch.dtype) -> None:
    """Not rounded further: most are not representable in 16 bits."""
    layers = layers_of(2, dtype)
    found = grad([y.float().sum() for y in lora_linears(*layers)], [*layers[2], *layers[3]])
    assert all(one.dtype == torch.float32 for one in found)
    assert all((one != one.to(dtype).float()).float().mean() > 0.5 for one in found)


def test_a_layer_without_dy_has_no_gradients() -> None:
    """They are None, which an optimizer skips, as if it had not been called, and not zeros."""
    layers = layers_of(3)
    outputs = lora_linears(*layers)
    found = grad(outputs[1].sum(), leaves_of(layers), allow_unused=True)
    has_gradient = [one is not None for one in found]
    assert has_gradient == [True, *[False, True, False] * 3, *[False] * 2]
    single = [one if isinstance(one, Tensor) else one[1] for one in layers]
    alone = grad(lora_linear(*single).sum(), single[:4])
    torch.testing.assert_close([one for one in found if one is not None], [*alone], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("trained", "products"), [("x a b", 5), ("x", 1), ("a", 1), ("b", 3), ("weight", 3)])
def test_layers_share_products(trained: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the backward pass of three layers: one for all lora_a, and a frozen input costs none.

    dlow and its part of dx are other calls, as are the second and third terms of dx: they are added in place.
    """
    layers = layers_of(3, biased=False)
    groups = dict(zip(("x", "weight", "a", "b"), layers, strict=False))
    leaves: list[Tensor] = []
    for name, group in groups.items():
        for leaf in [group] if isinstance(group, Tensor) else group:
            leaf.requires_grad_(name in trained.split())
            leaves += [leaf] if leaf.requires_grad else []
    outputs = lora_linears(*layers)
    seen, original = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: seen.append(args) or original(*args, **options))
    grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    assert len(seen) == products


def test_weights_in_4_bits() -> None:
    check_weights_in_4_bits(lora_linears)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_float8(dtype: torch.dtype) -> None:
    check_weights_in_float8(lora_linears, dtype)

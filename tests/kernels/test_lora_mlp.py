"""The fast lora_mlp: chunks of tokens, what is saved, and how many products a backward pass takes."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks

from tests.operations.lora_linear import randn
from tests.operations.lora_mlp import CHECKS, layers_of, leaves_of
from unsloth_fast.kernels import lora_mlp
from unsloth_ref import kernels as reference
from unsloth_ref.types import GatedActivation

FILE: Any = sys.modules["unsloth_fast.kernels.lora_mlp"]
ACTIVATIONS: tuple[GatedActivation, ...] = ("silu", "gelu", "gelu_tanh")


@pytest.mark.parametrize("empty", [None, "rows", "columns", "inner", "out"])
@pytest.mark.parametrize("chunk", [1, 3, 4096])  # of ten tokens
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_the_references(
    activation: GatedActivation, chunk: int, empty: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FILE, "CHUNK", chunk)
    sizes: dict[str, Any] = {empty: 0} if empty else {}
    layers = layers_of(**sizes, dtype=torch.float32)
    found, wanted = (f(*layers, activation=activation) for f in (lora_mlp, reference.lora_mlp))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    dy = randn(*wanted.shape, dtype=torch.float32, seed=50).detach()
    ours, theirs = (grad(y, leaves_of(layers), dy) for y in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_chunks_are_added_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of one chunk and of ten differ by one rounding to 16 bits."""
    layers = layers_of(rows=40, dtype=torch.bfloat16)
    dy = randn(2, 40, 4, dtype=torch.bfloat16, seed=50).detach()
    found = []
    for chunk in (80, 8):
        monkeypatch.setattr(FILE, "CHUNK", chunk)
        found.append(grad(lora_mlp(*layers), leaves_of(layers), dy))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7 * one.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_have_float32_gradients(dtype: torch.dtype) -> None:
    """Not rounded further: most are not representable in 16 bits."""
    layers = layers_of(dtype=dtype, wide=True)
    found = grad(lora_mlp(*layers).float().sum(), [*layers[2], *layers[3]])
    assert all(one.dtype == torch.float32 for one in found)
    assert all((one != one.to(dtype).float()).float().mean() > 0.5 for one in found)


def test_the_product_of_gate_and_up_is_not_saved() -> None:
    """Only gate and up are kept between the layers: 384 KiB for 512 tokens and 96 columns in float32."""
    x, *others = layers_of(rows=256, columns=8, inner=96, out=8, dtype=torch.float32)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = lora_mlp(x, *others)
    between = [tensor for tensor in kept if tensor.shape == (512, 96)]
    assert sum(tensor.nbytes for tensor in between) == 2 * 512 * 96 * 4
    hidden = torch.nn.functional.silu(between[0]) * between[1]
    again = reference.lora_linear(hidden, *(each[2] for each in others)).view(y.shape)
    torch.testing.assert_close(again, y, rtol=0, atol=1e-5 * y.abs().max().item())
    rest = {tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor.shape != (512, 96)}
    adapters = [*others[0], *others[1], *others[2]]
    assert sum(rest.values()) == x.nbytes + sum(one.nbytes for one in adapters) + 512 * (2 + 3 + 1) * 4


def test_the_backward_pass_works_on_chunks_and_leaves_saved_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backward pass, and gate and up after the first, have the same bits."""
    monkeypatch.setattr(FILE, "CHUNK", 4)
    layers, seen, kept = layers_of(dtype=torch.float32), list[int](), list[Tensor]()
    launch = FILE.launch_backward
    monkeypatch.setattr(FILE, "launch_backward", lambda dh, *others: seen.append(len(dh)) or launch(dh, *others))
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = lora_mlp(*layers)
    before = [tensor.clone() for tensor in kept]
    first = grad(y.sum(), leaves_of(layers), retain_graph=True)
    assert seen == [4, 4, 2]
    assert all(map(torch.equal, before, kept))
    assert all(map(torch.equal, first, grad(y.sum(), leaves_of(layers))))


@pytest.mark.parametrize(
    ("trained", "products"), [("x weight a b", 10), ("x a b", 7), ("x", 2), ("a", 3), ("b", 4), ("weight", 4)]
)
def test_a_frozen_input_costs_no_product(trained: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in one chunk: dh, the first of three terms of dx, one for lora_a of gate and up, and one per gradient.

    The gradients of low and the other terms are added in place, by other calls.
    """
    layers = layers_of(dtype=torch.float32)
    groups = dict(zip(("x", "weight", "a", "b"), layers, strict=False))
    leaves: list[Tensor] = []
    for name, group in groups.items():
        for leaf in [group] if isinstance(group, Tensor) else group:
            leaf.requires_grad_(name in trained.split())
            leaves += [leaf] if leaf.requires_grad else []
    y, seen, original = lora_mlp(*layers[:5]), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: seen.append(args) or original(*args, **options))
    grad(y, leaves, torch.ones_like(y))
    assert len(seen) == products


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_what_both_backends_keep(check: Callable[..., None]) -> None:
    check(lora_mlp)

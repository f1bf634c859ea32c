"""Both lora_linear: the reference against its formulas in numpy and peft's layer, the fast one on what is its own."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import linear

from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference

# Float64: sums of at most 40 terms below 100, each off by 1.1e-16 of itself, stay under 1e-12; float32 would not.
FLOAT64: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers from a seed of their own, ready for gradients."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def inputs_of(rows: int = 6, columns: int = 5, out: int = 4, rank: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    """x, weight, lora_a, lora_b and bias."""
    shapes = (rows, columns), (out, columns), (rank, columns), (out, rank), (out,)
    return [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def test_values_worked_by_hand() -> None:
    """With x = (1, 2), weight (3, 4), bias 5, lora_a (6, 7), lora_b 8: 3 + 8 + 5 + 0.5 * 8 * (6 + 14) = 96."""
    x, weight, a, b = (torch.tensor([row], dtype=torch.float64) for row in ([1, 2], [3, 4], [6, 7], [8]))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, a, b, torch.tensor([5.0], dtype=torch.float64))]
    y = reference.lora_linear(*leaves[:4], 0.5, leaves[4])
    assert y.tolist() == [[96.0]]
    # 3 + 0.5 * 8 * 6, 4 + 0.5 * 8 * 7;  x;  0.5 * 8 x;  0.5 * (6 + 14);  1
    wanted = [[[27.0, 32.0]], [[1.0, 2.0]], [[4.0, 8.0]], [[10.0]], [1.0]]
    assert [gradient.tolist() for gradient in grad(y.sum(), leaves)] == wanted


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    sizes=st.tuples(*[st.integers(0, 5)] * 3),
    scaling=st.sampled_from([1.0, 0.3, 0.0, -2.0]),
    biased=st.booleans(),
)
def test_formulas_of_the_docstrings(lead: list[int], sizes: tuple[int, int, int], scaling: float, biased: bool) -> None:
    """Forward and backward, in numpy, for any shape, empty ones too."""
    columns, out, rank = sizes
    _, *leaves = inputs_of(0, columns, out, rank)
    leaves = [randn(*lead, columns, seed=7), *leaves][: 5 if biased else 4]
    y = reference.lora_linear(*leaves[:4], scaling, *leaves[4:])
    dy = randn(*lead, out, seed=8).detach()
    assert y.shape == dy.shape

    x, weight, a, b, *bias = (leaf.detach().cpu().numpy() for leaf in leaves)
    rows, g = x.reshape(int(np.prod(lead)), columns), dy.cpu().numpy().reshape(int(np.prod(lead)), out)
    flat = rows @ weight.T + sum(bias) + scaling * (rows @ a.T) @ b.T
    dlow = scaling * g @ b
    wanted = (g @ weight + dlow @ a).reshape(x.shape), g.T @ rows, dlow.T @ rows, scaling * g.T @ (rows @ a.T), g.sum(0)
    torch.testing.assert_close(y.detach().cpu().numpy(), flat.reshape(y.shape), **FLOAT64)
    for found, right in zip(grad(y, leaves, dy), wanted, strict=False):
        torch.testing.assert_close(found.cpu().numpy(), right, **FLOAT64)


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_the_derivatives(biased: bool) -> None:
    """First and second derivatives against finite differences."""
    inputs = inputs_of()[: 5 if biased else 4]

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.lora_linear(x, weight, a, b, 0.3, bias)

    assert gradcheck(layer, inputs)
    assert gradgradcheck(layer, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_same_bits_as_peft(dtype: torch.dtype, biased: bool) -> None:
    """Its layer without dropout, adapters in the dtype of x; value and gradients."""
    config = LoraConfig(r=8, lora_alpha=10, init_lora_weights=False, target_modules=["proj"])
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(48, 65, bias=biased)})
    layer: Any = inject_adapter_in_model(config, model)["proj"].to(DEVICE, dtype).requires_grad_()
    base, adapters = layer.base_layer, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    leaves = [randn(2, 7, 48, dtype=dtype), base.weight, *adapters, *([base.bias] if biased else [])]
    ours = reference.lora_linear(*leaves[:4], 1.25, *leaves[4:])
    theirs = layer(leaves[0])
    assert torch.equal(ours, theirs)
    dy = randn(2, 7, 65, dtype=dtype, seed=1).detach()
    for our_grad, their_grad in zip(grad(ours, leaves, dy), grad(theirs, leaves, dy), strict=True):
        assert torch.equal(our_grad, their_grad)


@pytest.mark.parametrize("kernels", [reference, fast], ids=["reference", "fast"])
@pytest.mark.parametrize("off", ["scaling", "lora_b"])
def test_an_adapter_that_is_off_is_not_there(off: str, kernels: Any) -> None:
    """Without scaling, and at the start of training, where lora_b is zero: value and gradients are the layer's."""
    x, weight, a, b, bias = inputs_of(dtype=torch.float32)
    with torch.no_grad():
        b.mul_(0.0 if off == "lora_b" else 1.0)
    y = kernels.lora_linear(x, weight, a, b, 0.0 if off == "scaling" else 2.0, bias)
    plain, dy = linear(x, weight, bias), randn(6, 4, dtype=torch.float32, seed=9).detach()
    torch.testing.assert_close(y, plain, rtol=1e-6, atol=1e-6)
    leaves = [x, weight, bias]
    for found, wanted in zip(grad(y, leaves, dy, retain_graph=True), grad(plain, leaves, dy), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    da, db = grad(y, (a, b), dy)
    assert not da.any()
    assert bool(db.any()) == (off == "lora_b")


@pytest.mark.parametrize("kernels", [reference, fast], ids=["reference", "fast"])
def test_autocast_changes_nothing(kernels: Any) -> None:
    inputs = inputs_of(dtype=torch.float32)
    plain = kernels.lora_linear(*inputs[:4], 0.5, inputs[4])
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = kernels.lora_linear(*inputs[:4], 0.5, inputs[4])
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("kernels", [reference, fast], ids=["reference", "fast"])
@pytest.mark.parametrize("empty", ["rows", "columns", "out", "rank"])
def test_empty_sizes(empty: str, kernels: Any) -> None:
    """What is left: a bias without columns, the layer without a rank, zero gradients without rows or an output."""
    sizes = {"rows": 6, "columns": 5, "out": 4, "rank": 3, empty: 0}
    inputs = inputs_of(**sizes, dtype=torch.float32)
    y = kernels.lora_linear(*inputs[:4], 0.5, inputs[4])
    wanted = reference.lora_linear(*(t.detach().double() for t in inputs[:4]), 0.5, inputs[4].detach().double())
    torch.testing.assert_close(y.detach().double(), wanted, rtol=1e-5, atol=1e-5)
    dx, dweight, da, db, dbias = grad(y.sum(), inputs)
    assert [t.shape for t in (dx, dweight, da, db, dbias)] == [t.shape for t in inputs]
    assert dbias.tolist() == [sizes["rows"]] * sizes["out"]
    wide = inputs[0].detach().double().sum(0)
    torch.testing.assert_close(dweight.double(), wide.expand(dweight.shape), rtol=1e-5, atol=1e-5)
    assert not da.any() and not db.any()  # zero, or of no elements
    _, weight, a, b, _ = (tensor.detach().double() for tensor in inputs)
    wanted = weight.sum(0) + 0.5 * b.sum(0) @ a
    torch.testing.assert_close(dx.double(), wanted.expand(dx.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_get_gradients_of_float32(dtype: torch.dtype) -> None:
    """The fast one adds them up in float32 and leaves them there: most are no numbers of 16 bits."""
    x, weight, a, b, _ = inputs_of(40, 32, 24, 8, dtype=dtype)
    a, b = (t.detach().float().requires_grad_() for t in (a, b))
    gradients = grad(fast.lora_linear(x, weight, a, b, 0.3).float().sum(), (a, b))
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, a, b)]
    exact = grad(reference.lora_linear(*leaves, 0.3).sum(), leaves[2:])
    for found, wanted in zip(gradients, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found != found.to(dtype).float()).float().mean() > 0.5
        assert (found.double() - wanted).norm() < 2 * torch.finfo(dtype).eps * wanted.norm()


def test_a_scaled_gradient_does_not_overflow_before_it_is_scaled() -> None:
    """dy @ lora_b and dy^T @ low are beyond float16's 65504; a quarter of them is not."""
    x, weight, a, b = (torch.full((64, 64), v, dtype=torch.float16, device=DEVICE) for v in (1.0, 0.0, 1 / 64, 32.0))
    dy = torch.full_like(x, 40.0)
    leaves = [t.requires_grad_() for t in (x, weight, a, b)]
    dx, _, da, db = grad(fast.lora_linear(*leaves, 0.25), leaves, dy)
    assert dx.tolist() == torch.full((64, 64), 64 * 40 * 32 / 4).tolist()
    assert da.isinf().all()  # 64 times as much
    assert db.tolist() == torch.full((64, 64), 64 * 40 / 4).tolist()


@pytest.mark.parametrize(
    ("trained", "products"), [("x weight lora_a lora_b", 4), ("x lora_a lora_b", 3), ("x", 1), ("lora_b", 1)]
)
def test_what_is_frozen_costs_no_product(trained: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fast one: dy with weight, x and low, and dlow with x; dlow itself and its part of dx are other calls."""
    names = ("x", "weight", "lora_a", "lora_b")
    inputs = dict(zip(names, inputs_of(dtype=torch.float32), strict=False))
    leaves = [tensor.requires_grad_(name in trained.split()) for name, tensor in inputs.items()]
    y = fast.lora_linear(*leaves, 0.3)
    made, original = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: made.append(args) or original(*args, **options))
    grad(y, [leaf for leaf in leaves if leaf.requires_grad], torch.ones_like(y))
    assert len(made) == products

"""Both linear_cross_entropy: the reference against PyTorch, and the fast one's chunks, gradients and memory."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy, linear

from unsloth_fast import kernels as fast
from unsloth_ref import kernels as reference

FLOAT64: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}  # a hundred roundings, far below a step in float32
LAWS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"logit_scale": 0.5, "softcap": 3.0},
    {"label_smoothing": 0.1, "z_loss": 0.01},
    {"reduction": "none", "softcap": 2.0},
    {"reduction": "sum", "num_items": 3},
]
CHUNKS = import_module("unsloth_fast.kernels._linear_cross_entropy")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs_of(
    rows: int = 9, columns: int = 6, vocab: int = 11, dtype: torch.dtype = torch.float64, ignored: float = 0.3
) -> Inputs:
    """Hidden, weight, labels and bias, the same every time; all but the labels ready for gradients."""
    rng = torch.Generator().manual_seed(rows + columns + vocab)
    shapes = (rows, columns), (vocab, columns), (vocab,)
    hidden, weight, bias = (torch.randn(shape, generator=rng).to(DEVICE, dtype).requires_grad_() for shape in shapes)
    labels = torch.randint(vocab, (rows,), generator=rng)
    return hidden, weight, labels.masked_fill(torch.rand(rows, generator=rng) < ignored, -100).to(DEVICE), bias


def with_gradients(function: Callable[..., Tensor], inputs: Inputs, dloss: float = 1.0, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of hidden, weight and bias."""
    hidden, weight, labels, bias = inputs
    loss = function(hidden, weight, labels, bias, **options)
    scale = torch.linspace(dloss, 2 * dloss, loss.numel(), dtype=loss.dtype, device=DEVICE).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias), scale)]


@LAWS
@given(
    rows=st.integers(0, 7),
    columns=st.integers(1, 6),
    vocab=st.integers(1, 9),
    biased=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["none", "sum"]),
)
def test_the_reference_is_torch_s(
    rows: int, columns: int, vocab: int, biased: bool, label_smoothing: float, reduction: Any
) -> None:
    """A linear layer, then the cross entropy of its output."""
    hidden, weight, labels, bias = inputs_of(rows, columns, vocab)
    last = bias if biased else None
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}
    ours = reference.linear_cross_entropy(hidden, weight, labels, last, **options)
    theirs = cross_entropy(linear(hidden, weight, last), labels, **options)
    torch.testing.assert_close(ours, theirs, **FLOAT64)
    leaves = [hidden, weight, *([bias] if biased else [])]
    for mine, other in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_s_derivatives(options: dict[str, Any]) -> None:
    """First and second, against differences."""
    hidden, weight, labels, bias = inputs_of(4, 3, 5)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear_cross_entropy(hidden, weight, labels, bias, **options)

    assert gradcheck(loss, (hidden, weight, bias))
    assert gradgradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("kernels", [reference, fast], ids=["reference", "fast"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_add_up(parts: int, kernels: Any) -> None:
    """Each divided by the targets of the whole batch."""
    dtype = torch.float64 if kernels is reference else torch.float32
    hidden, weight, labels, bias = inputs_of(dtype=dtype)
    items = (labels != -100).sum()
    whole = kernels.linear_cross_entropy(hidden, weight, labels, bias)
    losses = [
        kernels.linear_cross_entropy(h, weight, y, bias, num_items=items)
        for h, y in zip(hidden.chunk(parts), labels.chunk(parts), strict=True)
    ]
    tolerance = FLOAT64 if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.stack(losses).sum(), whole, **tolerance)
    for part, full in zip(
        torch.autograd.grad(torch.stack(losses).sum(), (hidden, weight, bias)),
        torch.autograd.grad(whole, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(part, full, **tolerance)


@pytest.mark.parametrize("kernels", [reference, fast], ids=["reference", "fast"])
def test_an_ignored_row_of_nan_is_as_if_it_were_not_there(kernels: Any) -> None:
    """Its gradient is exactly 0, and what it leaves of all others has the bits that they have without it, if fast."""
    dtype = torch.float64 if kernels is reference else torch.float32
    hidden, weight, labels, bias = inputs_of(dtype=dtype)
    kept = labels != -100
    with torch.no_grad():
        hidden[~kept] = float("nan")
    there = with_gradients(kernels.linear_cross_entropy, (hidden, weight, labels, bias))
    without = (hidden.detach()[kept].requires_grad_(), weight, labels[kept], bias)
    gone = with_gradients(kernels.linear_cross_entropy, without)
    assert 0 < int(kept.sum()) < len(kept)
    assert not there[1][~kept].any()
    there[1] = there[1][kept]
    for one, other in zip(there, gone, strict=True):
        if kernels is fast:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, **FLOAT64)


@pytest.mark.parametrize("kernels", [reference, fast], ids=["reference", "fast"])
def test_without_a_target_all_is_zero(kernels: Any) -> None:
    hidden, weight, labels, bias = inputs_of(dtype=torch.float32)
    for found in with_gradients(kernels.linear_cross_entropy, (hidden, weight, labels.fill_(-100), bias)):
        assert not found.any()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows_a_chunk", [1, 2, 4, 128])
def test_the_number_of_chunks_does_not_matter(
    rows_a_chunk: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the order in which float32 sums are added up."""
    inputs = inputs_of(dtype=torch.float32)
    exact = with_gradients(reference.linear_cross_entropy, _widened(inputs), dloss=0.7, **options)
    monkeypatch.setattr(CHUNKS, "chunk_rows", lambda *sizes: rows_a_chunk)
    for one, other in zip(with_gradients(fast.linear_cross_entropy, inputs, dloss=0.7, **options), exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def _widened(inputs: Inputs) -> Any:
    return tuple(
        tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs
    )


@pytest.mark.parametrize(
    ("rows", "columns", "vocab"),
    [
        (8192, 2048, 128256),
        (8192, 4096, 128256),
        (16384, 4096, 151936),
        (4096, 2048, 128256),
        (100, 64, 1000),
        (0, 8, 9),
    ],
)
def test_chunks_fit_their_memory(rows: int, columns: int, vocab: int) -> None:
    """Logits and dhidden of bfloat16 under 512 MiB, in chunks of whole tiles; a trained weight's are no smaller."""
    size = CHUNKS.chunk_rows(rows, columns, vocab, 2)
    assert size % 128 == 0 < size
    assert min(rows, size) * vocab * 2 + rows * columns * 2 < 512 * 2**20
    assert size >= min(1024, rows)
    assert CHUNKS.chunk_rows(rows, columns, vocab, 2, True) >= size


def test_chunks_stay_of_use_where_hidden_fills_the_memory() -> None:
    assert CHUNKS.chunk_rows(2**17, 8192, 128256, 2) >= 256


@pytest.mark.parametrize("options", [*OPTIONS, {"num_items": 0.5}])
def test_a_cuda_graph_takes_all_rows(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot read back how many count; a NaN in an ignored one reaches nothing all the same."""
    hidden, weight, labels, bias = inputs_of(dtype=torch.float32)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    exact = with_gradients(reference.linear_cross_entropy, _widened((hidden, weight, labels, bias)), **options)
    monkeypatch.setattr(CHUNKS, "captured", lambda tensor: True)
    monkeypatch.setattr(CHUNKS, "chunk_rows", lambda *sizes: 4)
    found = with_gradients(fast.linear_cross_entropy, (hidden, weight, labels, bias), **options)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert not found[1][labels == -100].any()


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_costs_no_product(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other gradient has the bits that it has beside it."""
    hidden, weight, labels, bias = inputs_of(dtype=torch.float32)
    _, dhidden, dweight, _ = with_gradients(fast.linear_cross_entropy, (hidden, weight, labels, bias))
    made: list[tuple[bool, ...]] = []
    gradients = CHUNKS.Gradients.finish

    def finish(self: Any, *others: Any) -> Any:
        found = gradients(self, *others)
        made.append(tuple(tensor.numel() > 0 for tensor in found))
        return found

    monkeypatch.setattr(CHUNKS.Gradients, "finish", finish)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    leaf = weight if frozen == "hidden" else hidden
    (found,) = torch.autograd.grad(fast.linear_cross_entropy(hidden, weight, labels), leaf)
    plain = fast.linear_cross_entropy(hidden, weight, labels, bias.detach())
    assert torch.equal(torch.autograd.grad(plain, leaf)[0], dweight if frozen == "hidden" else dhidden)
    assert found.shape == leaf.shape
    assert set(made) == {(frozen == "weight", frozen == "hidden", False)}


@pytest.mark.parametrize("recorded", [False, True])
def test_nothing_is_made_for_gradients_that_are_not_wanted(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, and where nothing requires one."""
    hidden, weight, labels, bias = inputs_of(dtype=torch.float32)
    if recorded:
        hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    monkeypatch.setattr(CHUNKS.Gradients, "__init__", None)
    with torch.set_grad_enabled(recorded):
        loss = fast.linear_cross_entropy(hidden, weight, labels, bias)
    exact = reference.linear_cross_entropy(hidden, weight, labels, bias)
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-6, atol=1e-6)


def test_a_loss_scaler_keeps_float16_gradients_above_underflow() -> None:
    """Of 4096 items each has a gradient of 2^-24 and less before the scale: under float16's smallest number."""
    hidden, weight, labels, bias = inputs_of(vocab=300, dtype=torch.float16)
    scaler = 2.0**14
    found = with_gradients(fast.linear_cross_entropy, (hidden, weight, labels, bias), scaler, num_items=4096)
    exact = with_gradients(
        reference.linear_cross_entropy, _widened((hidden, weight, labels, bias)), scaler, num_items=4096
    )
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert (one.double() - other).norm() <= 2.0**-9 * other.norm()


def test_a_label_outside_the_vocabulary_gives_nan_where_it_is_not_read() -> None:
    """As on CUDA: the row's loss and gradient, and what it adds to weight and bias; other rows are untouched."""
    module = import_module("unsloth_fast.kernels.linear_cross_entropy")
    hidden, weight, _, bias = inputs_of(4, dtype=torch.float32)
    labels, options = torch.tensor([1, 11, -100, 3], device=DEVICE), (-100, 1.0, 0.0, 0.0, 0.0)
    arguments = hidden.detach(), weight.detach(), bias.detach(), labels
    losses, _ = module.forward_op(*arguments, *options)
    assert losses.isnan().tolist() == [False, True, False, False]
    loss, dhidden, dweight, dbias = module.total_op(*arguments, None, None, True, True, True, *options)
    assert all(tensor.isnan().all() for tensor in (loss, dweight, dbias))
    assert dhidden.isnan().all(-1).tolist() == [False, True, False, False]
    assert not dhidden[2].any()

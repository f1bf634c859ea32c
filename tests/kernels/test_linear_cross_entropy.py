"""The fast linear_cross_entropy: its chunks, gradients and memory."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.tensors import NO_OPTIONS
from tests.operations.linear_cross_entropy import (
    DEVICE,
    OPTIONS,
    Inputs,
    check_that_all_is_zero_without_targets,
    check_that_ignored_rows_of_nan_have_no_effect,
    check_that_parts_add_up,
    inputs_of,
    with_gradients,
)
from unsloth_fast.kernels import linear_cross_entropy
from unsloth_ref import kernels as reference
from unsloth_ref.types import IGNORE_INDEX

CHUNKS = import_module("unsloth_fast.kernels._linear_cross_entropy")
OPERATION = import_module("unsloth_fast.kernels.linear_cross_entropy")


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_add_up(parts: int) -> None:
    check_that_parts_add_up(linear_cross_entropy, parts, torch.float32, {"rtol": 1e-5, "atol": 1e-6})


def test_ignored_rows_of_nan_have_no_effect() -> None:
    """The results have the same bits."""

    def assert_equal(one: Tensor, other: Tensor) -> None:
        assert torch.equal(one, other)

    check_that_ignored_rows_of_nan_have_no_effect(linear_cross_entropy, torch.float32, assert_equal)


def test_all_is_zero_without_targets() -> None:
    check_that_all_is_zero_without_targets(linear_cross_entropy)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 4, 128])
def test_the_number_of_chunks_does_not_matter(
    rows_per_chunk: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results differ only by the order of float32 sums."""
    inputs = inputs_of(dtype=torch.float32)
    exact = with_gradients(reference.linear_cross_entropy, _widened(inputs), dloss=0.7, **options)
    monkeypatch.setattr(CHUNKS, "chunk_rows", lambda *sizes: rows_per_chunk)
    for one, other in zip(with_gradients(linear_cross_entropy, inputs, dloss=0.7, **options), exact, strict=True):
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
    """bfloat16 logits and dhidden take less than 512 MiB; a trained weight makes chunks no smaller."""
    size = CHUNKS.chunk_rows(rows, columns, vocab, 2)
    assert size % 128 == 0 < size
    assert min(rows, size) * vocab * 2 + rows * columns * 2 < 512 * 2**20
    assert size >= min(1024, rows)
    assert CHUNKS.chunk_rows(rows, columns, vocab, 2, True) >= size


def test_chunks_are_not_tiny_if_hidden_fills_the_memory() -> None:
    assert CHUNKS.chunk_rows(2**17, 8192, 128256, 2) >= 256


@pytest.mark.parametrize("options", [*OPTIONS, {"num_items": 0.5}])
def test_a_cuda_graph_takes_all_rows(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph cannot read how many rows are ignored; a NaN in an ignored row still has no effect."""
    hidden, weight, labels, bias = inputs_of(dtype=torch.float32)
    with torch.no_grad():
        hidden[labels == IGNORE_INDEX] = float("nan")
    exact = with_gradients(reference.linear_cross_entropy, _widened((hidden, weight, labels, bias)), **options)
    monkeypatch.setattr(CHUNKS, "captured", lambda tensor: True)
    monkeypatch.setattr(CHUNKS, "chunk_rows", lambda *sizes: 4)
    found = with_gradients(linear_cross_entropy, (hidden, weight, labels, bias), **options)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert not found[1][labels == IGNORE_INDEX].any()


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_input_costs_no_product(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other gradient has the same bits as with both."""
    hidden, weight, labels, bias = inputs_of(dtype=torch.float32)
    _, dhidden, dweight, _ = with_gradients(linear_cross_entropy, (hidden, weight, labels, bias))
    computed: list[tuple[bool, ...]] = []
    original = CHUNKS.GradientSums.finish

    def finish(self: Any, *others: Any) -> Any:
        found = original(self, *others)
        computed.append(tuple(tensor.numel() > 0 for tensor in found))
        return found

    monkeypatch.setattr(CHUNKS.GradientSums, "finish", finish)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    leaf = weight if frozen == "hidden" else hidden
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), leaf)
    with_bias = linear_cross_entropy(hidden, weight, labels, bias.detach())
    assert torch.equal(torch.autograd.grad(with_bias, leaf)[0], dweight if frozen == "hidden" else dhidden)
    assert found.shape == leaf.shape
    assert set(computed) == {(frozen == "weight", frozen == "hidden", False)}


@pytest.mark.parametrize("enabled", [False, True])
def test_no_gradient_is_computed_unless_needed(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is computed under no_grad, or if no input requires a gradient."""
    hidden, weight, labels, bias = inputs_of(dtype=torch.float32)
    if enabled:
        hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    monkeypatch.setattr(CHUNKS.GradientSums, "__init__", None)
    with torch.set_grad_enabled(enabled):
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    exact = reference.linear_cross_entropy(hidden, weight, labels, bias)
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-6, atol=1e-6)


def test_a_loss_scaler_keeps_float16_gradients_above_underflow() -> None:
    """With 4096 items, unscaled gradients are 2^-24 or less: below the smallest number of float16."""
    hidden, weight, labels, bias = inputs_of(vocab=300, dtype=torch.float16)
    scaler = 2.0**14
    found = with_gradients(linear_cross_entropy, (hidden, weight, labels, bias), scaler, num_items=4096)
    exact = with_gradients(
        reference.linear_cross_entropy, _widened((hidden, weight, labels, bias)), scaler, num_items=4096
    )
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert (one.double() - other).norm() <= 2.0**-9 * other.norm()


def test_an_unchecked_label_outside_the_vocabulary_gives_nan() -> None:
    """As on CUDA, the row's loss and gradient are NaN, and those of weight and bias; other rows are not affected."""
    hidden, weight, _, bias = inputs_of(4, dtype=torch.float32)
    labels, options = torch.tensor([1, 11, IGNORE_INDEX, 3], device=DEVICE), NO_OPTIONS
    arguments = hidden.detach(), weight.detach(), bias.detach(), labels
    losses, _ = OPERATION.forward_op(*arguments, *options)
    assert losses.isnan().tolist() == [False, True, False, False]
    loss, dhidden, dweight, dbias = OPERATION.total_op(*arguments, None, None, True, True, True, *options)
    assert all(tensor.isnan().all() for tensor in (loss, dweight, dbias))
    assert dhidden.isnan().all(-1).tolist() == [False, True, False, False]
    assert not dhidden[2].any()

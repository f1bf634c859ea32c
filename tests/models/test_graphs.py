"""A stack of layers that is recorded and replayed trains as one that is launched layer by layer.

CUDA graphs need a GPU; elsewhere `tests.models.recorder` stands in for them.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.models.recorder import (
    FULL,
    OTHER,
    SHORT,
    batch,
    graphs_after,
    model_of,
    passes,
    replays,
    same,
    stack_graphs,
    use_recorder,
)
from unsloth_fast.models import graphs, recording
from unsloth_fast.models.checkpointing import enable_checkpointing, enable_offloading

_recorder = pytest.fixture(autouse=True)(use_recorder)
STEPS = [(FULL,), (OTHER,), (SHORT, FULL), (FULL, OTHER, SHORT), (OTHER,)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("lora", [True, False])
def test_a_recorded_stack_has_the_bits_of_the_others(name: str, lora: bool) -> None:
    """Losses and gradients, over batches of one size, with and without padding, accumulated or not."""
    expected = [passes(model_of(name, lora), *step) for step in STEPS]
    model = model_of(name, lora)
    with graphs.recorded(model):
        found = [passes(model, *step) for step in STEPS]
        recordings = stack_graphs(model)._recordings
        assert list(recordings) == [256]
    for (losses, grads), (expected_losses, expected_grads), step in zip(found, expected, STEPS, strict=True):
        exact = not any(each is SHORT for each in step)  # a padded batch may sum in another order, in float32
        for one, other in zip([*losses, *grads], [*expected_losses, *expected_grads], strict=True):
            assert torch.equal(one, other) if exact else (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-9


@pytest.mark.parametrize("offloaded", [False, True])
def test_checkpointed_layers_are_recorded(offloaded: bool) -> None:
    """The results have the bits of layers that keep their activations; dropping these is part of the recording."""
    expected = passes(model_of(), OTHER)
    model = model_of()
    if offloaded:
        enable_offloading(model.get_base_model())
    model.enable_input_require_grads()
    enable_checkpointing(model.get_base_model(), True)
    with graphs.recorded(model):
        passes(model, FULL)
        found = passes(model, OTHER)
        assert list(stack_graphs(model)._recordings) == [256]
    assert same(found, expected)


def test_a_changed_model_is_recorded_again() -> None:
    """A weight that moves, another scaling, another adapter: each has its own bits."""

    def move(model: Any) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data * 2

    def scale(model: Any) -> None:
        model.base_model.model.model.layers[1].mlp.up_proj.set_scale("default", 3.0)

    def add(model: Any) -> None:
        torch.manual_seed(1)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("second")

    for change in (move, scale, add):
        plain, model = model_of(), model_of()
        with graphs.recorded(model):
            assert graphs_after(model, FULL, OTHER)._recordings
            change(plain)
            change(model)
            for each in (OTHER, FULL, OTHER):
                found, expected = passes(model, each), passes(plain, each)
                assert same(found, expected), change.__name__
            assert stack_graphs(model)._recordings


def test_evaluation_and_other_batches_run_as_usual() -> None:
    """Nothing is recorded of them, and they change nothing of what is recorded."""
    model = model_of()
    with graphs.recorded(model):
        graphs_after(model, FULL, OTHER)
        before = replays(model)
        model.eval()
        passes(model, FULL)
        model.train()
        with torch.no_grad():
            model(input_ids=FULL["input_ids"], position_ids=FULL["position_ids"], use_cache=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            passes(model, FULL)
        many = batch(*[3] * 21)  # more documents than there is room for
        expected, found = passes(model_of(), many), passes(model, many)
        assert same(found, expected)
        assert replays(model) == before > 0


OBSTACLES: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight": (lambda model: model.model.norm.weight.register_hook(lambda grad: grad / 2), "a hook of a weight"),
    "hook": (lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *_: None), "a hook of a LlamaMLP"),
    "dropout": (lambda model: setattr(model.model.layers[0], "extra", torch.nn.Dropout(0.1)), "dropout"),
    "attention": (lambda model: setattr(model.config, "attention_dropout", 0.1), "attention_dropout=0.1"),
    "frozen": (lambda model: model.model.requires_grad_(False), "the layers have no weight to train"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_forbids_recording_is_logged_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The layers then run one by one, with the same results."""
    change, reason = OBSTACLES[name]
    model = model_of(lora=False)
    change(model)
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        assert not graphs_after(model, FULL, OTHER, FULL, OTHER)._recordings
    assert caplog.text.count("the layers are launched one by one: ") == caplog.text.count(reason) == 1


def test_a_recording_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An operation that reads a value on the host cannot be recorded."""
    model = model_of()
    own = recording.capture

    def failing(*arguments: Any) -> Any:
        own(*arguments)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(recording, "capture", failing)
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        found = [passes(model, each) for each in (FULL, OTHER, FULL)]
    expected = [passes(model_of(), each) for each in (FULL, OTHER, FULL)]
    for one, other in zip(found, expected, strict=True):
        assert same(one, other)
    assert "recording failed: operation not permitted when stream is capturing" in caplog.text
    assert "more" not in caplog.text


def test_a_recording_that_fails_frees_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would not be used any more."""
    model, large = model_of(), batch(*[64] * 8)
    with graphs.recorded(model):
        assert list(graphs_after(model, large, large)._recordings) == [512]
        monkeypatch.setattr(recording, "capture", lambda *_: {}["missing"])
        assert not graphs_after(model, FULL, OTHER)._recordings


def test_a_copy_is_not_recorded() -> None:
    """Graphs cannot be copied, nor pickled."""
    model = model_of(lora=False)
    with graphs.recorded(model):
        graphs_after(model, FULL, OTHER)
        copied = copy.deepcopy(model)
        assert stack_graphs(model)._recordings and stack_graphs(copied) is None
        found, expected = passes(copied, FULL), passes(model, FULL)
        assert same(found, expected)
    assert stack_graphs(model) is None


def test_a_larger_size_begins_anew() -> None:
    """Smaller ones are recorded again, in its memory; each has the bits of the others."""
    model, large = model_of(), batch(*[64] * 8)
    sizes = []
    with graphs.recorded(model):
        for each in (FULL, OTHER, large, large, FULL, large):
            found, expected = passes(model, each), passes(model_of(), each)
            assert same(found, expected)
            sizes.append(list(stack_graphs(model)._recordings))
    assert sizes == [[], [256], [256], [512], [512, 256], [512, 256]]


def test_a_padded_batch_takes_a_recorded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at most twice its tokens, or an eighth above them once its own size is frequent, which is then recorded.

    A batch without padding keeps its own size, and its bits.
    """
    monkeypatch.setattr(graphs, "padded_size", lambda tokens: -(-tokens // 16) * 16)
    monkeypatch.setattr(graphs, "RARE", 2)
    model = model_of()
    padded, small, whole, tiny = batch(60, 60, 60, 55), batch(60, 60, 60, 46), batch(60, 60, 60, 60), batch(60, 55)
    rare, frequent, more = [256], [256, 240], [256, 240, 128]
    turns = [(padded, rare), (small, rare), (small, rare), (small, frequent), (whole, frequent), (padded, frequent)]
    with graphs.recorded(model):
        graphs_after(model, FULL, OTHER)
        for each, sizes in (*turns, (tiny, frequent), (tiny, more)):
            found, expected = passes(model, each), passes(model_of(), each)
            pairs = list(zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True))
            assert all((one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-9 for one, other in pairs)
            assert each is not whole or same(found, expected)
            assert list(stack_graphs(model)._recordings) == sizes
        assert [one._forward.replays for one in stack_graphs(model)._recordings.values()] == [4, 3, 1]


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 256), (257, 512), (2049, 2304), (4096, 4096), (4097, 4608), (8193, 9216)]
)
def test_sizes(tokens: int, size: int) -> None:
    """From 2048 tokens on, a size is at most an eighth above them."""
    assert graphs.padded_size(tokens) == size

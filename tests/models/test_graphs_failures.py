"""A recording that fails, or for which there is no memory, changes nothing of a training."""

import logging
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.models.recorder import (
    DEVICE,
    FULL,
    OTHER,
    batch,
    graphs_after,
    loss_of,
    model_of,
    passes,
    replays,
    same,
    stack_graphs,
    use_recorder,
)
from unsloth_fast.models import graphs, recording

_recorder = pytest.fixture(autouse=True)(use_recorder)
LARGE = batch(*[64] * 8)


class TritonError(Exception):
    """Like Triton's error, it has no base but Exception."""


class Layer(torch.nn.Module):
    """A norm with a forward of a test."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def with_layer(function: Callable[[Tensor], Tensor]) -> Any:
    """A model whose last norm is that function."""
    model: Any = model_of()
    model.base_model.model.model.norm = Layer(function)
    return model.train()


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why layers are not recorded, as the log has it."""
    words = "the layers are launched one by one: "
    return [record.getMessage().partition(words)[2] for record in caplog.records if words in record.getMessage()]


def out_of_memory(*_: object) -> Any:
    """Raise torch's error."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("place", ["before", "forward", "backward"])
@pytest.mark.parametrize(
    "error", [TritonError("at 3:4\nmore"), torch.AcceleratorError("capture"), OSError("no ptxas"), KeyError("x")]
)
def test_an_error_while_recording_is_logged_once(
    error: Exception, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The layers then run one by one, with the same results; nothing is left of the recording."""
    monkeypatch.setitem(sys.modules, "triton.errors", SimpleNamespace(TritonError=TritonError))
    model, own, calls = model_of(), recording.capture, [place == "backward"]

    def failing(*arguments: Any) -> Any:
        if calls.pop():
            calls.append(False)
            return own(*arguments)
        raise error

    monkeypatch.setattr(recording, "_rehearse" if place == "before" else "capture", failing)
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        for each in (FULL, OTHER, FULL, OTHER):
            assert same(passes(model, each), passes(model_of(), each))
        found = stack_graphs(model)
        assert not found._recordings and found._memory.pool is found._memory.gradients is None
    assert reasons(caplog) == [f"recording failed: {str(error).partition(chr(10))[0]}"]


def test_a_value_that_is_read_on_the_host(caplog: pytest.LogCaptureFixture) -> None:
    """CUDA cannot end such a recording; the stream, the memory and the random numbers are as before."""

    def positive(x: Tensor) -> Tensor:
        return x if x.detach().sum().item() != 1.5 else -x

    model, plain, other = with_layer(positive), with_layer(positive), model_of()
    caplog.set_level(logging.INFO, graphs.__name__)
    torch.manual_seed(3)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    stream = torch.cuda.current_stream() if DEVICE == "cuda" else None
    with graphs.recorded(model), graphs.recorded(other):
        for each in (FULL, OTHER, FULL):
            assert same(passes(model, each), passes(plain, each))
        assert not stack_graphs(model)._recordings
        assert torch.equal(torch.rand(3, device=DEVICE), expected)
        assert stream is None or torch.cuda.current_stream() == stream
        assert graphs_after(other, FULL, OTHER)._recordings
    assert len(reasons(caplog)) == 1 and "capturing" in reasons(caplog)[0]


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.1),
    "host": lambda x: x * torch.rand(()).item(),
    "random": lambda x: x * random.random(),
    "numpy": lambda x: x * float(numpy.random.rand()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_layers_that_draw_random_numbers_are_not_recorded(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """They draw those that they draw without graphs."""
    found = []
    caplog.set_level(logging.INFO, graphs.__name__)
    for wanted in (True, False):
        model = with_layer(DRAWS[name])
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(5)
        with graphs.recorded(model if wanted else torch.nn.Module()):
            found.append([passes(model, each) for each in (FULL, OTHER, FULL)])
    assert all(map(same, *found))
    assert reasons(caplog) == ["recording failed: the layers draw random numbers"]


def test_a_weight_that_is_no_parameter_of_the_stack(caplog: pytest.LogCaptureFixture) -> None:
    """It has its gradient, as the layers are not recorded."""
    hidden = torch.nn.Parameter(torch.full((32,), 2.0, device=DEVICE))
    model = with_layer(lambda x: x * hidden)
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        for each in (FULL, OTHER, FULL):
            hidden.grad = None
            passes(model, each)
            assert hidden.grad is not None
    assert reasons(caplog) == ["recording failed: the layers train a tensor that is none of their weights"]


def test_a_size_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Neither it nor a larger one is tried again; smaller ones are recorded."""
    model, own = model_of(), recording.capture
    monkeypatch.setattr(recording, "capture", out_of_memory)
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        for each in (LARGE, LARGE, LARGE):
            assert same(passes(model, each), passes(model_of(), each))
        monkeypatch.setattr(recording, "capture", own)
        for each in (LARGE, FULL, batch(*[64] * 12), LARGE, FULL, batch(*[64] * 12), OTHER):
            assert same(passes(model, each), passes(model_of(), each))
        assert list(stack_graphs(model)._recordings) == [256] and replays(model) == 2
    assert reasons(caplog) == ["batches of more than 511 tokens, for which there is no memory"]


def test_recordings_make_room(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Another pass that runs out of memory runs once more without them; the layers are recorded again later."""
    model = model_of()

    def fails(*_: object) -> None:
        if stack_graphs(model)._recordings:
            out_of_memory()

    caplog.set_level(logging.INFO, graphs.__name__)
    monkeypatch.setattr(graphs, "LATER", 2)
    with graphs.recorded(model):
        for _ in range(2):
            assert graphs_after(model, FULL, OTHER, FULL, FULL, FULL)._recordings
            layer = model.base_model.model.model.layers[1]
            hook = layer.register_forward_pre_hook(fails)
            with torch.no_grad():
                logits = model(input_ids=LARGE["input_ids"], use_cache=False).logits
            hook.remove()
            assert logits.isfinite().all() and not stack_graphs(model)._recordings
            assert same(passes(model, FULL), passes(model_of(), FULL))
    assert reasons(caplog) == ["out of memory beside the recordings, which are dropped; they are made again later"]


def test_a_pass_that_needs_more_than_the_recordings_fails() -> None:
    """Once more, and not again and again; without recordings at once."""
    model, calls = model_of(), []

    def failing() -> None:
        calls.append(1)
        out_of_memory()

    with graphs.recorded(model) as recordings:
        for recorded, expected in ((False, 1), (True, 2)):
            assert not recorded or graphs_after(model, FULL, OTHER)._recordings
            calls.clear()
            with pytest.raises(torch.OutOfMemoryError):
                recordings.with_room(failing)
            assert len(calls) == expected and not stack_graphs(model)._recordings


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_step_is_repeated_where_it_adds_to_no_gradient(accumulated: bool) -> None:
    """The gradients that a backward pass leaves when it runs out of memory cannot be told from earlier ones."""
    model, calls = model_of(), []

    def step() -> list[list[Tensor]]:
        calls.append(1)
        if len(calls) == 1:
            model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
            out_of_memory()
        return passes(model, FULL)

    with graphs.recorded(model) as recordings:
        graphs_after(model, FULL, OTHER)
        if accumulated:
            loss_of(model, FULL).backward()
            with pytest.raises(torch.OutOfMemoryError):
                recordings.with_room(step, model)
        else:
            assert same(recordings.with_room(step, model), passes(model_of(), FULL))
    assert len(calls) == 1 + (not accumulated)

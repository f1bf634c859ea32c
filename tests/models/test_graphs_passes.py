"""Recorded layers have the gradients of others, in whatever order the passes come, and whoever keeps a gradient."""

from contextlib import nullcontext
from typing import Any

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
    use_recorder,
)
from unsloth_fast.models import graphs, recording

_recorder = pytest.fixture(autouse=True)(use_recorder)


def test_two_forward_passes_before_a_backward_pass() -> None:
    """The second runs as without graphs, as do all until the first has had its backward pass or is gone."""
    found = []
    for model in (model_of(), model_of()):
        with graphs.recorded(model):
            if found:
                graphs_after(model, FULL, OTHER)
            (loss_of(model, FULL) * loss_of(model, OTHER)).backward()
            with torch.no_grad():
                loss_of(model, FULL)
            found.append([one.grad.clone() for one in model.parameters() if one.grad is not None])
    assert found[0] and all(map(torch.equal, *found))
    with graphs.recorded(model):
        graphs_after(model, FULL, OTHER)
        before = replays(model)
        waiting = [loss_of(model, FULL), loss_of(model, FULL)]
        assert replays(model) == before + 1
        waiting.clear()
        loss_of(model, FULL)
        assert replays(model) == before + 2


def test_several_backward_passes() -> None:
    """A retained graph has the same gradients again; not after another forward pass, nor with other weights."""
    model, plain = model_of(), model_of()
    with graphs.recorded(model):
        graphs_after(model, FULL, OTHER)
        for each in (model, plain):
            loss = loss_of(each, FULL)
            loss.backward(retain_graph=True)
            (loss * 2).backward(retain_graph=True)
        ours, theirs = ([one.grad for one in each.parameters() if one.grad is not None] for each in (model, plain))
        assert ours and len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
        loss = loss_of(model, FULL)
        loss.backward(retain_graph=True)
        later = loss_of(model, FULL)
        with pytest.raises(RuntimeError, match=r"got a second backward pass .* or cuda_graphs=False"):
            loss.backward()
        with torch.no_grad():
            next(one for one in model.parameters() if one.requires_grad).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.backward()


def test_gradients_are_those_of_their_parameters_alone() -> None:
    """Two that are equal do not share memory, and one that somebody keeps is not overwritten."""

    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (torch.nn.Parameter(torch.ones(32, device=DEVICE)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.one + self.two)

    model = model_of(lora=False)
    norm: Any = Shifted()
    model.model.norm = norm
    with graphs.recorded(model):
        assert graphs_after(model, FULL, OTHER)._recordings
        loss_of(model, FULL).backward()
        kept, other = norm.one.grad, norm.two.grad
        assert torch.equal(kept, other) and kept.data_ptr() != other.data_ptr()
        before = kept.clone()
        model.zero_grad()
        loss_of(model, OTHER).backward()
        assert torch.equal(kept, before) and not torch.equal(kept, norm.one.grad)
        assert replays(model) == 3


def test_gradients_that_autograd_returns_are_kept() -> None:
    """Two losses of the same outputs, and another pass, each have their own gradients."""
    found = []
    for wanted in (True, False):
        model = model_of()
        with graphs.recorded(model) if wanted else nullcontext():
            for each in (FULL, OTHER):
                loss_of(model, each).backward()
            weights = [one for one in model.parameters() if one.requires_grad]
            loss = loss_of(model, FULL)
            first = torch.autograd.grad(loss, weights, retain_graph=True)
            second = torch.autograd.grad(loss * 3, weights, retain_graph=True)
            loss.backward()
            third = torch.autograd.grad(loss_of(model, OTHER), weights)
            found.append([*first, *second, *third, *(one.grad for one in weights)])
            assert not wanted or replays(model) == 5  # two of them for a second backward pass
    assert all(map(torch.equal, *found))


def test_batches_of_several_sizes_are_accumulated() -> None:
    """A replay leaves the gradients of the earlier ones alone, whatever memory the recordings share."""
    large, small = batch(*[64] * 8), batch(*[64] * 4)
    steps = [(large,), (large,), (small,), (small,), (small, large, small), (large, small), (small, small), (small,)]
    model = model_of()
    with graphs.recorded(model):
        found = [passes(model, *step) for step in steps]
        assert replays(model) == 10
    expected = [passes(model_of(), *step) for step in steps]
    assert all(map(same, found, expected))


def test_an_optimizer_within_the_backward_pass() -> None:
    """Hooks that take a weight's gradient as soon as it is there run in each replay."""
    found = []
    for wanted in (True, False):
        model = model_of()
        weights = [one for one in model.parameters() if one.requires_grad]

        def step(weight: Tensor) -> None:
            assert weight.grad is not None
            with torch.no_grad():
                weight.sub_(weight.grad, alpha=1e-3)
            weight.grad = None

        for weight in weights:
            weight.register_post_accumulate_grad_hook(step)
        with graphs.recorded(model) if wanted else nullcontext():
            losses = [passes(model, each)[0][0] for each in (FULL, OTHER, FULL, OTHER)]
            assert not wanted or replays(model) == 3
        found.append([*losses, *weights])
    assert all(map(torch.equal, *found))


def test_an_interrupted_pass_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it stops while it is recorded, before its backward pass or within it."""
    plain, model = model_of(), model_of()
    places = [(recording, name) for name in ("_rehearse", "capture", "_apart")]
    places += [(recording.Recording, name) for name in ("forward", "backward")]
    for owner, name in places:
        with graphs.recorded(model):
            passes(model, FULL)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    passes(model, OTHER)
            model.zero_grad()
            for each in (OTHER, FULL):
                assert same(passes(model, each), passes(plain, each)), name
            assert replays(model) >= 2, name


def interrupt(*_: object) -> None:
    """Raise what Ctrl-C raises."""
    raise KeyboardInterrupt

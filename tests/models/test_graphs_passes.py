"""Recorded layers have the gradients of others, in whatever order the passes come, and whoever keeps a gradient."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_graphs import (
    DEVICE,
    FULL,
    OTHER,
    _recorder,  # noqa: F401  # a fixture
    graphs_after,
    model_of,
    stack_graphs,
)
from unsloth_fast.models import graphs


def loss_of(model: Any, each: dict[str, Any]) -> Tensor:
    """The sum of the squared logits of a batch."""
    inputs = {name: value for name, value in each.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits.square().sum()


def test_two_forward_passes_before_a_backward_pass() -> None:
    """The second runs as without graphs, as do all until the first has had its backward pass or is gone."""
    found = []
    for model in (model_of(), model_of()):
        with graphs.recorded(model):
            if found:
                before = graphs_after(model, FULL, OTHER).passes
            (loss_of(model, FULL) * loss_of(model, OTHER)).backward()
            with torch.no_grad():
                loss_of(model, FULL)
            found.append([one.grad.clone() for one in model.parameters() if one.grad is not None])
    assert found[0] and all(map(torch.equal, *found))
    with graphs.recorded(model):
        before = graphs_after(model, FULL, OTHER).passes
        waiting = [loss_of(model, FULL), loss_of(model, FULL)]
        assert stack_graphs(model).passes == before + 1
        waiting.clear()
        loss_of(model, FULL)
        assert stack_graphs(model).passes == before + 2


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


def test_gradients_are_those_of_their_parameters_alone(caplog: pytest.LogCaptureFixture) -> None:
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
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        assert graphs_after(model, FULL, OTHER)._recordings
        loss_of(model, FULL).backward()
        kept, other = norm.one.grad, norm.two.grad
        assert torch.equal(kept, other) and kept.data_ptr() != other.data_ptr()
        before = kept.clone()
        model.zero_grad()
        loss_of(model, OTHER).backward()
        assert torch.equal(kept, before) and not torch.equal(kept, norm.one.grad)
    assert "gradients of earlier steps are kept" in caplog.text

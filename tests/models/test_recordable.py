"""A stack that changes, or whose layers leave something behind, trains with graphs as without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn

from tests.models.recorder import (
    DEVICE,
    FULL,
    OTHER,
    backend_for_graphs,
    graphs_after,
    model_of,
    passes,
    same,
    stack_graphs,
    use_recorder,
)
from unsloth_fast.models import graphs, place

_recorder = pytest.fixture(autouse=True)(use_recorder)


class Layer(nn.Module):
    """A layer of a user's own, whose Python uses a number."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.number, self.calls = 2.0, 0
        self.seen: list[int] = []
        self.loss: Tensor | None = None
        self.register_buffer("mean", torch.zeros(32, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.number + self.mean


def with_layer() -> Any:
    """A model with one."""
    model: Any = model_of()
    model.base_model.model.model.layers[0].post_attention_layernorm = Layer()
    return model.train()


def layer_of(model: Any) -> Any:
    """That layer, or the norm in its place."""
    return model.base_model.model.model.layers[0].post_attention_layernorm


def with_ia3() -> Any:
    """A model with adapters that have no scaling."""
    model: Any = get_peft_model(model_of(lora=False), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    for name, parameter in model.named_parameters():
        if "ia3" in name:
            parameter.data.mul_(3)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    place(model, backend_for_graphs())
    return model.train()


def replace(model: Any) -> None:
    model.base_model.model.model.layers[1].mlp = Layer().train()


def renew(model: Any) -> None:
    norm = layer_of(model)
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def merge(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.up_proj.merge()


def infer(model: Any) -> None:
    with torch.inference_mode():
        layer_of(model).mean = torch.ones(32, device=DEVICE)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "module": (model_of, replace),
    "weight": (model_of, renew),
    "merged": (model_of, merge),
    "number": (with_layer, lambda model: setattr(layer_of(model), "number", 0.5)),
    "buffer": (with_layer, lambda model: setattr(layer_of(model), "mean", torch.ones(32, device=DEVICE))),
    "inference": (with_layer, infer),
    "ia3": (with_ia3, lambda model: model.base_model.disable_adapter_layers()),
    "hook": (model_of, lambda model: layer_of(model).weight.requires_grad_().register_hook(lambda grad: grad / 2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    """Whatever somebody changes between two steps."""
    make, change = CHANGES[name]
    plain, model = make(), make()
    with graphs.recorded(model):
        assert graphs_after(model, FULL, OTHER)._recordings
        change(plain)
        change(model)
        for each in (OTHER, FULL, OTHER, FULL):
            found, expected = passes(model, each), passes(plain, each)
            assert len(found[1]) == len(expected[1])
            assert same(found, expected)


def count(layer: Any, x: Tensor) -> Tensor:
    layer.calls += 1
    return x * layer.calls


def collect(layer: Any, x: Tensor) -> Tensor:
    layer.seen.append(x.shape[1])
    return x


def average(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        layer.mean.lerp_(x.detach().mean((0, 1)), 0.1)
    return x - layer.mean.clone()


def lose(layer: Any, x: Tensor) -> Tensor:
    layer.loss = x.square().mean((0, 1))
    return x


@pytest.mark.parametrize("forward", [count, collect, average, lose])
def test_what_leaves_something_behind_is_not_recorded(
    forward: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A counter, a list, a running mean, a loss: they have the values that they have without graphs."""
    monkeypatch.setattr(Layer, "forward", forward)
    plain, model = with_layer(), with_layer()
    with graphs.recorded(model):
        for each in (FULL, OTHER, FULL, OTHER):
            found, expected = passes(model, each), passes(plain, each)
            assert same(found, expected)
        assert not stack_graphs(model)._recordings
    ours, theirs = layer_of(model), layer_of(plain)
    assert (ours.calls, ours.seen) == (theirs.calls, theirs.seen) and torch.equal(ours.mean, theirs.mean)

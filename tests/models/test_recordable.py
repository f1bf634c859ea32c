"""A stack that changes, or whose layers leave something behind, trains with graphs as without."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.recorder import (
    DEVICE,
    FULL,
    OTHER,
    backend_for_graphs,
    graphs_after,
    model_of,
    passes,
    replays,
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
        self.settings = SimpleNamespace(factors={"one": [1.0]})
        self.logger = logging.getLogger(__name__)  # which remembers what it was asked
        self.scale, self.gate = nn.Parameter(torch.ones(1, device=DEVICE)), torch.ones(1, device=DEVICE)
        self.loss: Tensor | None = None
        self.register_buffer("mean", torch.zeros(32, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        self.logger.isEnabledFor(logging.DEBUG)
        return x * self.number * self.scale * self.gate * self.settings.factors["one"][0] + self.mean


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


def rescale(model: Any) -> None:
    """An equal weight, which from now on is another one."""
    layer_of(model).scale = nn.Parameter(torch.ones(1, device=DEVICE))


def reload(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def unfreeze(model: Any) -> None:
    model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.requires_grad_(True)


def freeze(model: Any) -> None:
    for parameter in model.base_model.model.model.layers[0].parameters():
        parameter.requires_grad_(False)


def transpose(model: Any) -> None:
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.data = weight.data.t()


def drop(model: Any) -> None:
    """Dropout that draws nothing."""
    model.base_model.model.model.layers[0].mlp.up_proj.lora_dropout["default"] = nn.Dropout(0.0)


def rotate(model: Any) -> None:
    model.base_model.model.model.rotary_emb.inv_freq.mul_(0.5)


def resize(model: Any) -> None:
    torch.manual_seed(2)
    model.resize_token_embeddings(64, mean_resizing=False)


def attend(model: Any) -> None:
    model.base_model.model.model.set_attn_implementation("eager")


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "module": (model_of, replace),
    "weight": (model_of, renew),
    "merged": (model_of, merge),
    "number": (with_layer, lambda model: setattr(layer_of(model), "number", 0.5)),
    "buffer": (with_layer, lambda model: setattr(layer_of(model), "mean", torch.ones(32, device=DEVICE))),
    "inference": (with_layer, infer),
    "ia3": (with_ia3, lambda model: model.base_model.disable_adapter_layers()),
    "equal weight": (with_layer, rescale),
    "equal tensor": (with_layer, lambda model: setattr(layer_of(model), "gate", torch.ones(1, device=DEVICE))),
    "tensor in place": (with_layer, lambda model: layer_of(model).gate.mul_(3)),
    "nested": (with_layer, lambda model: layer_of(model).settings.factors["one"].__setitem__(0, 0.5)),
    "loaded": (model_of, reload),
    "unfrozen": (model_of, unfreeze),
    "frozen": (model_of, freeze),
    "transposed": (model_of, transpose),
    "dropout": (model_of, drop),
    "buffer in place": (model_of, rotate),
    "attention": (model_of, attend),
    "evaluated": (model_of, lambda model: model.base_model.model.model.layers[0].eval()),
    "resized": (model_of, resize),
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


SWITCHES: dict[str, Callable[[bool], AbstractContextManager[object] | None]] = {
    "class": lambda on: setattr(Layer, "forward", (lambda self, x: x * 3) if on else OWN),
    "deterministic": lambda on: torch.use_deterministic_algorithms(on, warn_only=True),
    "anomaly": torch.autograd.set_detect_anomaly,
    "precision": lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
}
OWN = Layer.forward


@pytest.mark.parametrize("name", SWITCHES)
def test_a_global_change_is_noticed(name: str) -> None:
    """It is recorded again under another setting."""
    plain, model, switch = with_layer(), with_layer(), SWITCHES[name]
    with graphs.recorded(model):
        before = graphs_after(model, FULL, OTHER)._recordings[256]
        try:
            switch(True)
            for each in (OTHER, FULL, OTHER, FULL):
                assert same(passes(model, each), passes(plain, each))
            assert stack_graphs(model)._recordings.get(256) is not before
        finally:
            switch(False)


class Observer(TorchDispatchMode):
    """Counts operators."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_observers_see_each_operation() -> None:
    """A mode that sees all operators, and hooks of all modules, see what they see without graphs."""
    seen = []
    for wanted in (True, False):
        model, modules, observer = model_of(), [], Observer()
        with graphs.recorded(model if wanted else nn.Module()):
            for each in (FULL, OTHER):
                passes(model, each)
            with observer:
                passes(model, FULL)
            hook = nn.modules.module.register_module_forward_hook(lambda module, *_, _all=modules: _all.append(module))
            passes(model, OTHER)
            hook.remove()
            assert not wanted or replays(model) == 1
        seen.append((observer.seen, len(modules)))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"return_dict": False}, {"use_cache": True}])
def test_other_outputs_are_not_replayed(options: dict[str, bool]) -> None:
    """Hidden states of all layers, a tuple, or a cache."""
    plain, model = model_of(lora=False), model_of(lora=False)
    inputs = {name: value for name, value in FULL.items() if name != "labels"}
    with graphs.recorded(model):
        graphs_after(model, FULL, OTHER)
        found, expected = (each.model(**inputs, **{"use_cache": False} | options) for each in (model, plain))
        assert type(found) is type(expected) and len(found) == len(expected) and replays(model) == 1


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


def learn(layer: Any, x: Tensor) -> Tensor:
    layer.scale.requires_grad_(False).add_(1)
    return x * layer.scale.item()


@pytest.mark.parametrize("forward", [count, collect, average, lose, learn])
def test_what_leaves_something_behind_is_not_recorded(
    forward: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A counter, a list, a running mean, a loss: they have the values that they have without graphs."""
    monkeypatch.setattr(Layer, "forward", forward)
    caplog.set_level(logging.INFO, graphs.__name__)
    plain, model = with_layer(), with_layer()
    with graphs.recorded(model):
        for each in (FULL, OTHER, FULL, OTHER, FULL, OTHER):
            found, expected = passes(model, each), passes(plain, each)
            assert same(found, expected)
        assert not stack_graphs(model)._recordings
    assert caplog.text.count("the layers are launched one by one: each forward pass changes something of them") == 1
    ours, theirs = layer_of(model), layer_of(plain)
    assert torch.equal(ours.scale, theirs.scale)
    assert (ours.calls, ours.seen) == (theirs.calls, theirs.seen) and torch.equal(ours.mean, theirs.mean)

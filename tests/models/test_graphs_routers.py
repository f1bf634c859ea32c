"""Recorded layers with experts hand over the logits of their routers, and take their gradients."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import output_capturing

from tests.models import zoo
from tests.models.recorder import (
    FULL,
    ON_GPU,
    OTHER,
    SHORT,
    backend_for_graphs,
    graphs_after,
    model_of,
    replays,
    same,
    stack_graphs,
    use_recorder,
)
from unsloth_fast.models import graphs
from unsloth_fast.models.checkpointing import enable_checkpointing
from unsloth_fast.models.head import add_loss, without_adapter

_recorder = pytest.fixture(autouse=True)(use_recorder)
STEPS = [(FULL,), (OTHER,), (FULL,), (OTHER, FULL), (SHORT, OTHER), (OTHER,)]


def balanced(model: Any, *batches: dict[str, Any], weight: float = 100.0) -> list[list[Tensor]]:
    """Loss, load-balancing loss and routers' logits of each microbatch, then the gradients of all."""
    found = []
    for each in batches:
        inputs = {name: value for name, value in each.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False, output_router_logits=True)
        assert all(len(one) == inputs["input_ids"].shape[1] for one in outputs.router_logits)
        loss = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], each["labels"][0, 1:], reduction="sum")
        (loss + weight * outputs.aux_loss).backward()
        found += [loss.detach(), outputs.aux_loss.detach(), *(one.detach() for one in outputs.router_logits)]
    grads = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    return [found, grads]


def close(found: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    """Whether they are the same up to the rounding of sums in another order, in float32."""
    pairs = zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True)
    return all((one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-8 for one, other in pairs)


@pytest.mark.parametrize("name", zoo.BALANCED)
@pytest.mark.parametrize("lora", [True, False])
def test_recorded_experts_have_the_bits_of_the_others(name: str, lora: bool) -> None:
    """Losses, routers' logits and gradients, accumulated or not; a padded batch may sum in another order."""
    plain, model = model_of(name, lora), model_of(name, lora)
    expected = [balanced(plain, *step) for step in STEPS]
    with graphs.recorded(model):
        for step, one in zip(STEPS, expected, strict=True):
            agree = close if any(each is SHORT for each in step) else same
            assert agree(balanced(model, *step), one)
        assert list(stack_graphs(model)._recordings) == [256] and replays(model) == 6
    unbalanced = balanced(plain, OTHER, weight=0.0)
    assert not same(unbalanced, expected[-1])  # the gradients depend on the routers' logits


def test_checkpointed_experts_are_recorded() -> None:
    """Their routers run twice, and hand over their logits once."""
    expected = balanced(model_of("qwen3_moe"), OTHER)
    model = model_of("qwen3_moe")
    model.enable_input_require_grads()
    enable_checkpointing(model.get_base_model(), True)
    with graphs.recorded(model):
        for each in (FULL, FULL, FULL):
            balanced(model, each)
        assert same(balanced(model, OTHER), expected)
        assert replays(model) == 2


def test_each_loss_has_its_own_gradients() -> None:
    """Those of the hidden states alone, of the routers alone, and of both again."""
    found = []
    for wanted in (True, False):
        model = model_of("qwen3_moe", lora=False)
        weights = list(model.model.layers.parameters())
        with graphs.recorded(model) if wanted else nullcontext():
            for each in (FULL, FULL, FULL):
                balanced(model, each)
            inputs = {name: value for name, value in OTHER.items() if name != "labels"}
            outputs = model(**inputs, use_cache=False, output_router_logits=True)
            losses = outputs.logits.square().sum(), outputs.aux_loss, outputs.router_logits[0].square().sum()
            for loss in (*losses, torch.stack(losses).sum()):
                grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                pairs = zip(weights, grads, strict=True)
                found.append([torch.zeros_like(one) if grad is None else grad for one, grad in pairs])
            assert not wanted or replays(model) == 5  # the later backward passes need the activations again
    half = len(found) // 2
    for ours, theirs in zip(found[:half], found[half:], strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_routers_without_a_gradient() -> None:
    """If no weight before the last router is trained, its logits have none, recorded or not."""
    found = []
    for wanted in (True, False):
        model = model_of("qwen3_moe", lora=False).requires_grad_(False)
        model.model.norm.requires_grad_(True)
        with graphs.recorded(model) if wanted else nullcontext():
            for each in (FULL, FULL, FULL):
                balanced(model, each)
            inputs = {name: value for name, value in OTHER.items() if name != "labels"}
            outputs = model(**inputs, use_cache=False, output_router_logits=True)
            assert not any(one.requires_grad for one in outputs.router_logits)
            found.append(balanced(model, OTHER))
            assert not wanted or replays(model) > 0
    assert same(*found)


def test_the_logits_are_there_where_they_are_asked_for() -> None:
    """The call or the configuration asks for them; another call is recorded anew."""
    model = model_of("qwen3_moe", lora=False)
    inputs = {name: value for name, value in FULL.items() if name != "labels"} | {"use_cache": False}
    with graphs.recorded(model):
        for configured in (False, True):
            model.config.output_router_logits = configured
            for asked, options in ((True, {"output_router_logits": True}), (False, {"output_router_logits": False})):
                for _ in range(4):
                    outputs = model.model(**inputs, **options)
                    assert (outputs.router_logits is not None) == asked
                    del outputs
                assert replays(model) >= 2
            for _ in range(4):
                outputs = model.model(**inputs)
                assert (outputs.router_logits is not None) == configured
                del outputs
            assert replays(model) >= 2


def test_a_model_without_routers_is_recorded_whatever_its_configuration_asks_for() -> None:
    """There is nothing to hand over."""
    model = model_of(lora=False)
    model.config.output_router_logits = True
    with graphs.recorded(model):
        assert graphs_after(model, FULL, OTHER)._recordings


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why layers are not recorded, as the log has it."""
    words = "the layers are launched one by one: "
    return [record.getMessage().partition(words)[2] for record in caplog.records if words in record.getMessage()]


def test_what_a_model_around_the_layers_collects(caplog: pytest.LogCaptureFixture) -> None:
    """A replay would leave it out."""
    model = model_of("qwen3_moe")
    caplog.set_level(logging.INFO, graphs.__name__)
    with graphs.recorded(model):
        for each in (FULL, FULL, FULL):
            balanced(model, each)
        before = replays(model)
        token = output_capturing._active_collector.set({"router_logits": []})
        try:
            balanced(model, FULL)
        finally:
            output_capturing._active_collector.reset(token)
        assert replays(model) == before > 0
    assert reasons(caplog) == ["a call with outputs that a model around the layers collects"]


def test_reentrant_checkpoints_keep_their_routers_without_gradients(caplog: pytest.LogCaptureFixture) -> None:
    """Recorded layers would have them."""
    found = []
    caplog.set_level(logging.INFO, graphs.__name__)
    for wanted in (True, False):
        model = model_of("qwen3_moe")
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
        with graphs.recorded(model) if wanted else nullcontext():
            found += [balanced(model, each) for each in (FULL, OTHER, FULL, OTHER)][-1:]
    assert same(*found)
    assert reasons(caplog) == ["router logits without gradients, as use_reentrant=True"]


def test_routers_of_another_form(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """They are handed over by layers that are not recorded."""
    model = model_of("qwen3_moe", lora=False)
    router = type(model.model.layers[0].mlp.gate)
    own = router.forward
    monkeypatch.setattr(router, "forward", lambda self, x: (own(self, x)[0][None], *own(self, x)[1:]))
    caplog.set_level(logging.INFO, graphs.__name__)
    inputs = {name: value for name, value in FULL.items() if name != "labels"} | {"use_cache": False}
    with graphs.recorded(model):
        for _ in range(4):
            assert model.model(**inputs, output_router_logits=True).router_logits[1].shape == (1, 256, 4)
    assert reasons(caplog) == ["recording failed: router logits of [1, 256, 4]"]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("lora", [True, False])
def test_experts_wait_for_nothing(name: str, lora: bool) -> None:
    """Neither the passes of their layers, recorded or launched one by one, nor the routers' part of the loss.

    The other part waits for the number of targets.
    """
    backend = backend_for_graphs()
    kernels = {
        **vars(backend.kernels),
        "linear_cross_entropy": lambda hidden, weight, *_, **__: (hidden @ weight.t()).sum(),
    }
    for wanted in (False, True):
        model = model_of(name, lora)
        add_loss(without_adapter(model), replace(backend, kernels=SimpleNamespace(**kernels)))
        with graphs.recorded(model) if wanted else nullcontext():
            for each in (FULL, FULL, FULL, FULL, OTHER):
                torch.cuda.set_sync_debug_mode("error" if each is OTHER else "default")
                try:
                    found = model(**each, use_cache=False, backend_loss=True, with_load_balancing=True)
                    (found.loss + found.load_balancing).backward()
                    del found  # what is left of an earlier pass keeps the layers from being recorded
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            assert not wanted or replays(model) >= 2

"""The load-balancing loss of experts is judged: each planted fault breaks the laws of a single batch."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.laws import LAWS
from conformance.models import trial as trials
from conformance.models.building import Subject
from conformance.models.task import quiet
from conformance.models.trial import ModelTrial
from conformance.tolerances.gates import Failure
from unsloth_fast.models import head


@pytest.fixture(autouse=True, scope="module")
def _silent() -> Iterator[None]:
    with quiet():
        yield


@cache
def trial_of() -> ModelTrial:
    """A Mixtral of one layer."""
    return ModelTrial(Subject.named("mixtral", num_hidden_layers=1), "reference", torch.float32, "cpu")


def broken(law: str, trial: ModelTrial) -> str:
    """How a law is broken."""
    with pytest.raises(Failure) as failed:
        LAWS[law].check(trial)
    return str(failed.value)


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        (lambda right, model, routers, mask: right(model, routers, mask).detach(), "the gradient of "),
        (lambda right, model, routers, mask: 0.0 * right(model, routers, mask), "the load-balancing loss"),
        (lambda right, model, routers, mask: right(model, routers, None), "the load-balancing loss"),
    ],
    ids=["without a gradient", "lost", "of padding too"],
)
def test_a_load_balancing_loss_of_experts(
    wrong: Callable[..., Tensor], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a fault that the loss of the tokens does not show."""
    own = head.load_balancing_loss
    monkeypatch.setattr(head, "load_balancing_loss", lambda *args: wrong(own, *args))
    assert f"in {place}" in broken("gradients", trial_of())
    assert LAWS["accumulated"].check(trial_of())


def test_a_router_whose_logits_are_not_those_of_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a placed model returns of its routers is wrong: its layers and the loss of its tokens are not."""

    def wrong(model: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda module, args, outputs: (2.0 * outputs[0], *outputs[1:]))

    place = trials.place
    monkeypatch.setattr(trials, "place", lambda model, backend: (place(model, backend), wrong(model)))
    trial = trial_of()
    assert LAWS["layers"].check(trial) and LAWS["accumulated"].check(trial)
    for law in ("gradients", "padding_free", "checkpointed", "adapters"):
        assert "in the load-balancing loss" in broken(law, trial)

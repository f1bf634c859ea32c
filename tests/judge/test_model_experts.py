"""The load-balancing loss of experts is judged: each planted fault breaks the laws of a single batch."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from conformance.laws import LAWS
from conformance.models.trial import ModelTrial
from tests.judge.model_trials import after_placing, broken, trial_of
from unsloth_fast.models import head

pytestmark = pytest.mark.usefixtures("quiet_models")


def mixtral() -> ModelTrial:
    """A Mixtral of one layer."""
    return trial_of("mixtral", num_hidden_layers=1)


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
    assert f"in {place}" in broken("gradients", mixtral())
    assert LAWS["accumulated"].check(mixtral())


def test_a_router_whose_logits_are_not_those_of_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a placed model returns of its routers is wrong: its layers and the loss of its tokens are not."""

    def wrong(model: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda module, args, outputs: (2.0 * outputs[0], *outputs[1:]))

    after_placing(monkeypatch, wrong)
    trial = mixtral()
    assert LAWS["layers"].check(trial) and LAWS["accumulated"].check(trial)
    for law in ("gradients", "padding_free", "checkpointed", "adapters"):
        assert "in the load-balancing loss" in broken(law, trial)

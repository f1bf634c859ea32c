"""The check of a head on a few tokens: what it finds, what it refuses with a sentence, and that it leaves no trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from tests import tiny
from tests.models import zoo
from tests.models.custom import CustomConfig, CustomForCausalLM
from unsloth_fast import FastLanguageModel, backends
from unsloth_fast.models import place
from unsloth_fast.models.head import add_loss, plain_head
from unsloth_fast.models.logits import logit_options

pytestmark = pytest.mark.filterwarnings("ignore")

REFERENCE = backends.resolve("reference")
TOKENS = torch.arange(3, 23).reshape(2, 10)


def check(model: Any) -> dict[str, float] | None:
    return logit_options(model, model.forward, {"labels": TOKENS, "use_cache": False})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cap", [None, 30.0])
def test_factors_and_caps_of_the_config(dtype: torch.dtype, cap: float | None) -> None:
    """A cap that no logit comes near is found, in 16 bits too; a field that has no effect is not."""
    model = tiny.model("gemma2", dtype, final_logit_softcapping=cap, logit_scale=0.25, logits_scaling=8.0)
    assert check(model) == {"logit_scale": 1.0, "softcap": cap or 0.0}
    assert check(CustomForCausalLM(CustomConfig()).to(dtype)) == {"logit_scale": 0.25, "softcap": 0.0}


def test_hooks_of_users_do_not_see_the_check() -> None:
    """The hooks stay where they are, in their order."""
    model, seen = tiny.model(), list[str]()
    parts = (model.get_input_embeddings(), model.model, model.lm_head)
    for part in parts:
        part.register_forward_pre_hook(lambda *_: seen.append("before"))
        part.register_forward_hook(lambda *_: seen.append("after"))
    hooks = [list(part._forward_hooks.values()) for part in parts]
    assert check(model) == {"logit_scale": 1.0, "softcap": 0.0} and seen == []
    assert [list(part._forward_hooks.values()) for part in parts] == hooks
    model(TOKENS)
    assert len(seen) == 6


def test_hooks_that_the_first_forward_adds_stay() -> None:
    """transformers records what routers return by hooks, on modules on which users may have some too."""
    model = zoo.model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *_: None)
    inputs = {"labels": TOKENS, "use_cache": False, "output_router_logits": True}
    assert logit_options(model, model.forward, inputs) == {"logit_scale": 1.0, "softcap": 0.0}
    assert len(model(TOKENS, output_router_logits=True).router_logits) == len(model.model.layers)


class Other(CustomForCausalLM):
    """Its logits come from the hidden states in a way of their own."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        hidden = self.body(self.tokens(input_ids)).last_hidden_state
        return CausalLMOutput(logits=self.changed(self.classifier(self.before(hidden))) / 4.0)

    def tokens(self, tokens: Tensor) -> Tensor:
        return tokens

    def before(self, hidden: Tensor) -> Tensor:
        return hidden

    def changed(self, logits: Tensor) -> Tensor:
        return logits


def first_larger(self: Any, logits: Tensor) -> Tensor:
    return logits + (torch.arange(logits.shape[-1]) == 0)


def fixed_cap(self: Any, logits: Tensor) -> Tensor:
    return 50.0 * (logits / 50.0).tanh()


def fixed_factor(self: Any, logits: Tensor) -> Tensor:
    return 1.1 * logits


def normalised(self: Any, hidden: Tensor) -> Tensor:
    return nn.functional.normalize(hidden, dim=-1)


def reversed_tokens(self: Any, tokens: Tensor) -> Tensor:
    return tokens.flip(-1)


def failing(self: Any, hidden: Tensor) -> Tensor:
    raise RuntimeError("no such product")


REFUSED: dict[Callable[..., Tensor], tuple[str, str]] = {
    first_larger: ("changed", "0 of 3 ways to make them from its head's products agree"),
    fixed_cap: ("changed", "0 of 3 ways to make them from its head's products agree"),
    fixed_factor: ("changed", "0 of 3 ways to make them from its head's products agree"),
    normalised: ("before", "0 of 3 ways to make them from its head's products agree"),
    reversed_tokens: ("tokens", "it does not give its base model the inputs unchanged"),
    failing: ("before", "the check on a few tokens failed: RuntimeError: no such product"),
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_other_logits_are_computed(change: Callable[..., Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """The check gives no options, and one sentence in the log states the reason; a step then computes all logits."""
    method, reason = REFUSED[change]
    model = type("Other", (Other,), {method: change})(CustomConfig()).bfloat16()
    assert check(model) is None
    assert caplog.messages == [f"loss: all logits of a Other are computed: {reason}"]


def biased(self: Any, logits: Tensor) -> Tensor:
    return logits + self.more


def gated(self: Any, hidden: Tensor) -> Tensor:
    return hidden * (1 + self.more[: hidden.shape[-1]])


@pytest.mark.parametrize(("method", "change"), [("changed", biased), ("before", gated)], ids=["bias", "gate"])
def test_a_weight_beside_the_head_that_changes_nothing_yet(
    method: str, change: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """It gets its gradient while it is trained. Frozen, it is no obstacle."""
    model: Any = type("Other", (Other,), {method: change})(CustomConfig())
    model.more = nn.Parameter(torch.zeros(len(tiny.WORDS)), requires_grad=False)
    assert check(model) == {"logit_scale": 0.25, "softcap": 0.0}
    model.more.requires_grad_(True)
    assert check(model) is None
    why = "they depend on weights beside those of its head: more"
    assert caplog.messages == [f"loss: all logits of a Other are computed: {why}"]
    add_loss(model, REFERENCE)
    model(input_ids=TOKENS, labels=TOKENS, backend_loss=True).loss.backward()
    assert model.more.grad is not None and model.more.grad.any()


class DropsOut(Other):
    """Dropout before the head."""

    def before(self, hidden: Tensor) -> Tensor:
        return nn.functional.dropout(hidden, 0.1, self.training)


def test_each_mode_is_checked(caplog: pytest.LogCaptureFixture) -> None:
    """Dropout before the head works in training alone; the sentence comes once."""
    model = DropsOut(CustomConfig())
    add_loss(model, REFERENCE)
    for training in (False, True, True, False):
        model.train(training)
        model(input_ids=TOKENS, labels=TOKENS, backend_loss=True)
    assert len(caplog.messages) == 1


def test_the_check_leaves_no_trace() -> None:
    """Modes, hooks, gradients and random numbers are as before, also with dropout and checkpointing."""
    model: Any = tiny.model("qwen2", attention_dropout=0.1)
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    place(model, REFERENCE)
    modes = [(module.training, *module._forward_hooks) for module in model.modules()]
    torch.manual_seed(0)
    assert check(model) == {"logit_scale": 1.0, "softcap": 0.0}
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
    assert [(module.training, *module._forward_hooks) for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_check_evaluates_no_linear_layer() -> None:
    """Where a CPU multiplies bfloat16, bitsandbytes repacks 4-bit weights in evaluation, for good."""
    model, modes = tiny.model().train(), list[bool]()
    for layer in model.model.layers:
        layer.self_attn.q_proj.forward = lambda x, layer=layer.self_attn.q_proj: (
            modes.append(layer.training) or nn.functional.linear(x, layer.weight)
        )
    assert check(model) == {"logit_scale": 1.0, "softcap": 0.0}
    assert modes and all(modes)


def test_the_first_step_under_autocast_has_every_gradient() -> None:
    """Autocast keeps its casts of weights, and those that the check made have no gradient."""
    gradients = []
    for repeated in (1, 2):
        model = tiny.model()
        add_loss(model, REFERENCE)
        for _ in range(repeated):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=TOKENS, labels=TOKENS, backend_loss=True, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(first is not None and torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_a_model_in_four_bits(tmp_path: Path) -> None:
    """Its head is in full precision."""
    pytest.importorskip("bitsandbytes")
    model, _ = FastLanguageModel.from_pretrained(
        tiny.folder(tmp_path), load_in_4bit=True, dtype=torch.float32, device_map="cpu", backend="reference"
    )
    assert plain_head(model) is not None
    assert check(model) == {"logit_scale": 1.0, "softcap": 0.0}

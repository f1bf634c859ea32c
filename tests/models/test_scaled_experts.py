"""Experts that get scaled tokens, as in Llama 4: gradients, roundings, and what is left to the model."""

from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from tests import tiny
from tests.models.families import EXPERT_WEIGHTS, assert_same, batch, build, error, step
from tests.models.with_lora import twice
from unsloth_fast import backends
from unsloth_fast.models import place
from unsloth_fast.models.experts import Experts
from unsloth_fast.models.scaled_experts import ScaledExperts, recognise_scaled_experts

pytestmark = pytest.mark.filterwarnings("ignore")

REFERENCE = backends.resolve("reference")
ADAPTED = [(), EXPERT_WEIGHTS, EXPERT_WEIGHTS[:1], EXPERT_WEIGHTS[1:]]
NAMES = ["full", "both", "gate_up", "down"]
PARTS = ("router", "experts", "shared_expert")


def model_of(*weights: str) -> Any:
    """Llama 4 in float64, with LoRA on weights of the experts."""
    model = build("llama4")
    if not weights:
        return model
    parameters = [f"experts.{name}" for name in weights]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    return get_peft_model(model, config)


def block(kind: type[Llama4TextMoe] = Llama4TextMoe, **config: Any) -> Any:
    """What holds four experts, of which a token goes through two."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 4}
    sizes["num_experts_per_tok"] = 2
    torch.manual_seed(0)
    module = kind(Llama4TextConfig(**sizes | config))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


@pytest.mark.parametrize("weights", ADAPTED, ids=NAMES)
def test_gradients_are_those_of_the_model(weights: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree in float64. No forward gives every token to every expert, and no adapters are added up."""
    model, (tokens, labels) = model_of(*weights), batch()
    with tiny.KeepFloat64():
        expected = step(model, tokens, labels)
        assert place(model, REFERENCE)["grouped_gemm" if weights else "moe_mlp"] == 2
        monkeypatch.setattr(Llama4TextExperts, "forward", None)
        monkeypatch.setattr(ParamWrapper, "_activate_lora", None)
        assert_same(step(model, tokens, labels), expected)


@pytest.mark.parametrize("weights", ADAPTED[:2], ids=NAMES[:2])
def test_the_fast_kernels_are_as_close_to_float64_as_the_model(weights: tuple[str, ...]) -> None:
    """The error of all gradients together is at most twice the untouched float32 model's own."""
    wide, (tokens, labels) = model_of(*weights), batch()
    model = model_of(*weights).float()
    wide.load_state_dict(model.state_dict())
    with tiny.KeepFloat64():
        _, truth = step(wide, tokens, labels)
    _, own = step(model, tokens, labels)
    place(model, backends.resolve("fast"))
    _, found = step(model, tokens, labels)
    assert 0 < error(found, truth) <= 2 * error(own, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_tokens_are_rounded_as_in_the_model(dtype: torch.dtype) -> None:
    """Nearly all bits are the same."""
    module, x = block().to(dtype), torch.randn(2, 50, 16).to(dtype)
    expected, expected_logits = module(x)
    assert "moe_mlp" in place(nn.ModuleDict({"block": module}), REFERENCE)
    found, logits = module(x)
    assert found.dtype == dtype and torch.equal(logits, expected_logits)
    assert (found != expected).float().mean() <= 1 / 32


def test_scores_of_zero_choose_no_expert() -> None:
    """A sigmoid that underflows: such experts add nothing, and get gradients of 0, whichever they are."""
    module, x = block().double(), torch.rand(3, 16).double().requires_grad_()
    with torch.no_grad():
        module.router.weight.uniform_(-2e4, -1e4)
    assert not module.router(x)[0].any()

    def run() -> list[torch.Tensor]:
        out, _ = module(x)
        return [out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))]

    expected = run()
    place(nn.ModuleDict({"block": module}), REFERENCE)
    for one, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("hooked", [True, False], ids=["hooks", "forward"])
@pytest.mark.parametrize("weights", ADAPTED[:2], ids=NAMES[:2])
def test_what_somebody_adds_to_experts_is_called(weights: tuple[str, ...], hooked: bool) -> None:
    model, (tokens, labels) = model_of(*weights), batch()
    inside: Any = [part for part in model.modules() if isinstance(part, Llama4TextExperts)][-1]
    if hooked:
        inside.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        inside.forward = MethodType(twice, inside)
    with tiny.KeepFloat64():
        expected = step(model, tokens, labels)
        place(model, REFERENCE)
        assert_same(step(model, tokens, labels), expected)


def test_two_active_adapters_are_left_to_peft() -> None:
    model, (tokens, labels) = model_of(*EXPERT_WEIGHTS), batch()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with tiny.KeepFloat64():
        expected = step(model, tokens, labels)
        place(model, REFERENCE)
        assert_same(step(model, tokens, labels), expected)


class ScaledOutputs(Llama4TextMoe):
    """The scores multiply what the experts compute."""

    def forward(self, hidden_states: Any) -> Any:
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)
        routed = self.experts(x.repeat(scores.shape[1], 1)).view(scores.shape[1], *x.shape)
        return self.shared_expert(x) + (routed * scores.T[:, :, None]).sum(0), logits


class OtherChoice(Llama4TextMoe):
    """It uses fewer experts than its router chooses."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.top_k = 1


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (block(), ScaledExperts(*PARTS, Experts("silu", transposed=True))),
        (block(num_experts_per_tok=1), ScaledExperts(*PARTS, Experts("silu", transposed=True))),
        (block(hidden_act="gelu_pytorch_tanh"), ScaledExperts(*PARTS, Experts("gelu_tanh", transposed=True))),
        (block(hidden_act="relu"), "differs from every moe_mlp by "),
        (block(ScaledOutputs), "differs from every moe_mlp by "),
        (block(OtherChoice), None),
        (block().shared_expert, None),
    ],
)
def test_they_are_recognised_by_what_they_compute(module: nn.Module, found: Any) -> None:
    seen = recognise_scaled_experts(module, {})
    assert seen.startswith(found) if isinstance(found, str) and isinstance(seen, str) else seen == found

"""Experts on the backend's operations, with and without adapters of their weights; experts of other kinds stay."""

import logging
import math
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch.nn import Module
from torch.nn.functional import silu
from transformers import DeepseekV4Config, GptOssConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tests import tiny
from tests.models.families import EXPERT_WEIGHTS, FAMILIES, assert_same, batch, build, error, step
from tests.models.with_lora import twice
from unsloth_fast import backends
from unsloth_fast.models import place, remove
from unsloth_fast.models.experts import Experts
from unsloth_fast.models.structure import recognise

REFERENCE = backends.resolve("reference")
SMALL = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}


def adapted(model: Any, *weights: str) -> Any:
    """The model with LoRA on weights of its experts, trained a little."""
    parameters = [f"experts.{name}" for name in weights]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gemma4, experts", "glm5"])
@pytest.mark.parametrize(
    "weights", [EXPERT_WEIGHTS, EXPERT_WEIGHTS[:1], EXPERT_WEIGHTS[1:]], ids=["both", "gate_up", "down"]
)
def test_adapters_of_experts_get_their_gradients(
    weights: tuple[str, ...], family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The gradients are peft's in float64, without peft's sum of weights and adapters; peft loads what is saved."""
    model, (tokens, labels) = adapted(build(family), *weights), batch()
    with tiny.KeepFloat64():
        expected = step(model, tokens, labels)
        placed = place(model, REFERENCE)
        blocks = FAMILIES[family].experts
        assert (placed["moe_mlp"], placed["grouped_gemm"]) == (blocks, blocks * len(weights))
        monkeypatch.setattr(ParamWrapper, "_activate_lora", None)
        assert_same(step(model, tokens, labels), expected)
    model.save_pretrained(str(tmp_path))
    loaded = dict(PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True).named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters() if p.requires_grad)


def test_an_adapter_of_a_bias_is_left_to_peft() -> None:
    model, (tokens, labels) = adapted(build("gpt_oss"), "gate_up_proj", "down_proj_bias"), batch()
    with tiny.KeepFloat64():
        expected = step(model, tokens, labels)
        place(model, REFERENCE)
        assert_same(step(model, tokens, labels), expected)


def test_what_is_no_single_active_adapter_is_left_to_peft() -> None:
    """This concerns a second adapter that is active too, adapters that are disabled, and merged ones."""
    model, (tokens, labels) = adapted(build("qwen3_moe"), *EXPERT_WEIGHTS), batch()
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    with tiny.KeepFloat64():
        expected = step(model, tokens, labels)
        place(model, REFERENCE)
        assert_same(step(model, tokens, labels), expected)
        both = model(tokens).logits
        with model.disable_adapter():
            without = model(tokens).logits
        model.merge_adapter()
        merged = model(tokens).logits
        remove(model)
        torch.testing.assert_close(merged, both, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(tokens).logits, merged, rtol=1e-10, atol=1e-10)
        model.unmerge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits, without, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("hooked", [True, False], ids=["hooks", "forward"])
@pytest.mark.parametrize("kind", [ParamWrapper, MixtralExperts])
def test_what_somebody_adds_inside_of_adapters_is_called(kind: type[Module], hooked: bool) -> None:
    """The hook or forward is on the experts, or on the adapter of their other weight."""
    model, (tokens, labels) = adapted(build("mixtral"), *EXPERT_WEIGHTS), batch()
    inside = [part for part in model.modules() if isinstance(part, kind)][-1]
    if hooked:
        inside.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        inside.forward = MethodType(twice, inside)
    with tiny.KeepFloat64():
        expected = step(model, tokens, labels)
        place(model, REFERENCE)
        assert_same(step(model, tokens, labels), expected)


def mixtral(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes = tiny.SIZES | SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM._from_config(MixtralConfig(**sizes), experts_implementation="eager")
    return model.to(dtype)


@pytest.mark.parametrize("weights", [(), EXPERT_WEIGHTS], ids=["full", "adapters"])
def test_the_fast_kernels_are_as_close_to_float64_as_the_model(weights: tuple[str, ...]) -> None:
    """The error of all gradients together is at most twice the untouched float32 model's own."""
    fast, (tokens, labels) = backends.resolve("fast"), batch()

    def made(dtype: torch.dtype) -> Any:
        model = mixtral(dtype)
        if weights:
            torch.manual_seed(1)
            model = adapted(model, *weights).to(dtype)
        return model

    wide, model = made(torch.float64), made(torch.float32)
    wide.load_state_dict(model.state_dict())
    with tiny.KeepFloat64():
        _, truth = step(wide, tokens, labels)
    _, own = step(model, tokens, labels)
    place(model, fast)
    _, found = step(model, tokens, labels)
    assert 0 < error(found, truth) <= 2 * error(own, truth)


def experts(forward: Any = None, activation: str = "silu") -> MixtralExperts:
    """Experts of a model, or of a class with another forward."""
    kind = type("MixtralExperts", (MixtralExperts,), {"forward": forward}) if forward else MixtralExperts
    return kind(MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=8, hidden_act=activation))


def clamped(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """What goes into the first product is bounded."""
    return MixtralExperts.forward(self, hidden_states.clamp(max=7.0), top_k_index, top_k_weights)


class Unclamped(GptOssExperts):
    """Experts with the biases of gpt-oss, but without its clamp."""

    def _apply_gate(self, gate_up: Any) -> Any:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return silu(gate) * up


class ClampedBelow(GptOssExperts):
    """Experts whose gate is clamped on both sides."""

    def _apply_gate(self, gate_up: Any) -> Any:
        return super()._apply_gate(gate_up.clamp(min=-7.0))


def gpt_oss(kind: type[GptOssExperts] = GptOssExperts, **attributes: float) -> GptOssExperts:
    """Its experts, or those of another class or with other attributes."""
    module = kind(GptOssConfig(hidden_size=16, intermediate_size=12, num_local_experts=8))
    vars(module).update(attributes)
    return module


def deepseek_v4() -> DeepseekV4Experts:
    sizes = {"hidden_size": 16, "moe_intermediate_size": 12, "n_routed_experts": 8}
    return DeepseekV4Experts(DeepseekV4Config(**sizes, swiglu_limit=5.0))


def unweighted(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    return MixtralExperts.forward(self, hidden_states, top_k_index, top_k_weights / top_k_weights)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (experts(), Experts("silu")),
        (experts(activation="gelu_pytorch_tanh"), Experts("gelu_tanh")),
        (experts(activation="relu"), "differs from every moe_mlp by "),
        (gpt_oss(), Experts("silu", True, 1.702, 7.0, 1.0, transposed=True, biased=True)),
        (gpt_oss(alpha=1.0, limit=3), Experts("silu", True, 1.0, 3.0, 1.0, transposed=True, biased=True)),
        (gpt_oss(Unclamped, limit=math.inf), Experts("silu", True, transposed=True, biased=True)),
        (gpt_oss(Unclamped), Experts("silu", True, transposed=True, biased=True)),
        (gpt_oss(ClampedBelow), "differs from every moe_mlp by "),
        (deepseek_v4(), Experts("silu", limit=5.0)),
        (experts(clamped), "differs from every moe_mlp by "),
        (experts(unweighted), "differs from every moe_mlp by "),
    ],
)
def test_experts_are_recognised_by_what_they_compute(module: Module, found: Any) -> None:
    seen = recognise(module, {})
    assert seen.startswith(found) if isinstance(found, str) and isinstance(seen, str) else seen == found


def test_experts_that_differ_stay_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert place(torch.nn.ModuleDict({"experts": experts(clamped)}), REFERENCE) == {}
    assert "MixtralExperts (differs from every moe_mlp by " in caplog.text


@pytest.mark.skipif(not hasattr(experts(), "_is_expert_parallel"), reason="this transformers has no such experts")
def test_a_part_of_the_experts_is_left_to_transformers() -> None:
    """An index that is no expert's stands for an expert of another process."""
    module = experts().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    x, indices, weights = torch.randn(3, 16).double(), torch.tensor([[0, 8], [7, 8], [8, 8]]), torch.rand(3, 2).double()
    module.config._experts_implementation = "eager"
    module._is_expert_parallel = True
    expected = module(x, indices, weights)
    place(torch.nn.ModuleDict({"experts": module}), REFERENCE)
    assert torch.equal(module(x, indices, weights), expected)

"""Families without a row, and a class that transformers does not have: what is placed, and that it is right."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.models import zoo
from tests.models.custom import CustomConfig, CustomForCausalLM
from tests.models.zoo import EXPERTS, SIZES
from unsloth_fast import backends
from unsloth_fast.models import place
from unsloth_fast.models.head import add_loss, without_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

REFERENCE = backends.resolve("reference")
KERNELS = {name: kernel for name, kernel in vars(REFERENCE.kernels).items() if name != "cross_entropy"}
WITHOUT_LOGITS = replace(REFERENCE, kernels=SimpleNamespace(**KERNELS))
LORA: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": ["router"], "init_lora_weights": False}
EAGER = {"experts_implementation": "eager"}  # grouped products take no float64
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2} | EAGER

# The language model, its config, the norms and the gated MLPs of two layers, and the linear layers in each of them.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int, int]] = {
    "phi3": ("Phi3", {}, 5, 2, 4),
    "olmo2": ("Olmo2", {}, 9, 2, 7),
    "granite": ("Granite", {"logits_scaling": 8.0, "residual_multiplier": 0.5}, 5, 2, 7),
    "cohere": ("Cohere", {"logit_scale": 0.25}, 0, 2, 7),
    "cohere2": ("Cohere2", {"logit_scale": 0.25}, 0, 2, 7),
    "seed_oss": ("SeedOss", {"residual_dropout": 0.0, "attention_dropout": 0.0}, 5, 2, 7),
    "smollm3": ("SmolLM3", {}, 5, 2, 7),
    "glm4": ("Glm4", {}, 9, 2, 6),
    "ministral": ("Ministral", {"sliding_window": 4}, 5, 2, 7),
    "ministral3": ("Ministral3", {}, 5, 2, 7),
    "hunyuan": ("HunYuanDenseV1", {}, 9, 2, 7),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | EAGER | {"num_experts": 4}, 9, 0, 4),
    "mixtral": ("Mixtral", FOUR, 5, 0, 4),
    "gpt_oss": ("GptOss", FOUR, 5, 0, 4),
    "llama4": ("Llama4", FOUR | {"num_local_experts": 2}, 5, 2, 7),
    "custom": ("", {}, 5, 2, 3),
}
WITH_EXPERTS = ("qwen3_moe", "mixtral")


def build(family: str) -> Any:
    """The model in float64, with random norm weights; skips what the installed transformers lacks."""
    name, options, *_ = FAMILIES[family]
    torch.manual_seed(0)
    if not name:
        model = CustomForCausalLM(CustomConfig())
    elif (model_class := getattr(transformers, f"{name}ForCausalLM", None)) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}ForCausalLM")
    else:
        model = model_class(model_class.config_class(**SIZES | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which about a third are no targets."""
    tokens = torch.randint(3, len(tiny.WORDS), (2, 9))
    return tokens, tokens.masked_fill(torch.rand(2, 9) < 0.3, -100)


def step(model: Any, tokens: torch.Tensor, labels: torch.Tensor, **options: Any) -> tuple[float, dict[str, Any]]:
    """The loss and every gradient."""
    model.zero_grad(set_to_none=True)
    found = model(input_ids=tokens, labels=labels, use_cache=False, **options)
    loss = found if options else found.loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_a_row(family: str, lora: bool) -> None:
    """Loss and every gradient are the untouched model's in float64; no logits are made, and each part is placed."""
    model = build(family)
    _, _, norms, gated, linear = FAMILIES[family]
    gate = "fused_swiglu" if family in ("phi3", "glm4") else "swiglu"
    expected = {"rms_norm": norms, gate: gated, "moe_mlp": 2 * (family in WITH_EXPERTS)}
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, **LORA))
        expected |= {"lora_linear": 2 * linear}
    tokens, labels = batch()
    with tiny.KeepFloat64():
        expected_loss, expected_gradients = step(model, tokens, labels)
        placed = Counter(place(model, REFERENCE))
        del placed["packed_attention"]  # see test_documents.py
        assert placed == Counter(expected)
        add_loss(without_adapter(model), WITHOUT_LOGITS)
        loss, gradients = step(model, tokens, labels, backend_loss=True)
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-18, name


@pytest.mark.parametrize("family", ["phi3", "custom"])
def test_the_fast_kernels_are_as_close_to_float64_as_the_model(family: str) -> None:
    """In all gradients together, at most twice the untouched float32 model's own error."""
    fast, (tokens, labels) = backends.resolve("fast"), batch()
    with tiny.KeepFloat64():
        _, truth = step(build(family), tokens, labels)
    model = build(family).float()
    _, own = step(model, tokens, labels)
    place(model, fast)
    add_loss(model, fast)
    _, found = step(model, tokens, labels, backend_loss=True)
    assert 0 < error(found, truth) <= 2 * error(own, truth)


def test_a_setting_for_swiglu_separates_the_fused_operation() -> None:
    """It governs the MLPs of Phi-3 too: the fused operation takes no other backend than its part."""
    for setting in ("swiglu", "fused_swiglu"):
        backend = backends.resolve(f"fast,{setting}=reference")
        assert place(build("phi3"), backend).keys() == {"rms_norm", "swiglu", "packed_attention"}


def error(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    return sum((gradients[name] - gradient).norm().item() ** 2 for name, gradient in truth.items()) ** 0.5


def test_an_adapter_on_another_layer_is_left_to_peft() -> None:
    """GPT-2 has layers of its own, with transposed weights."""
    model = get_peft_model(zoo.model("gpt2"), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    assert place(model, REFERENCE) == {}

"""Hybrids of attention and layers with a state: packed, padded and generating, and what is refused by name."""

import logging
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5

from tests import tiny
from tests.models import zoo
from tests.models.test_attention import LENGTHS, assert_near, gradients_of, separately, together
from unsloth_fast import UnslothTrainingArguments, backends
from unsloth_fast.data.facts import decide_batching
from unsloth_fast.models import place, remove
from unsloth_fast.models.checking import quietly_on_the_cpu
from unsloth_fast.models.mixers import Mixer, recognise_mixer

REFERENCE = backends.resolve("reference")
HEADS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
DELTA = HEADS | {"linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_n_heads": 8, "mamba_chunk_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
SCAN = ("causal_conv", "mamba2_scan")
# Names of language models and their configurations, what they need beside tiny.SIZES, and the mixer's operations.
HYBRIDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "Qwen3_5": ("Qwen3_5TextConfig", DELTA, ("causal_conv", "gated_delta_rule")),
    "Qwen3Next": (
        "Qwen3NextConfig",
        DELTA | EXPERTS | {"shared_expert_intermediate_size": 16},
        ("causal_conv", "gated_delta_rule"),
    ),
    "Lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, ("causal_conv",)),
    "GraniteMoeHybrid": ("GraniteMoeHybridConfig", MAMBA | LOCAL | {"layer_types": ["mamba", "attention"]}, SCAN),
    "FalconH1": ("FalconH1Config", MAMBA | {"mamba_d_ssm": 64, "num_hidden_layers": 1, "mamba_rms_norm": True}, SCAN),
    "Bamba": ("BambaConfig", MAMBA | {"attn_layer_indices": [1]}, SCAN),
    "NemotronH": (
        "NemotronHConfig",
        {"mamba_head_dim": 8, "mamba_num_heads": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16}
        | {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "time_step_min": 0.1},
        SCAN,
    ),
    "Zamba2": (
        "Zamba2Config",
        {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "use_mem_rope": True}
        | {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "chunk_size": 16},
        SCAN,
    ),
}
each_hybrid = pytest.mark.parametrize("name", HYBRIDS)
pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(name: str) -> PreTrainedModel:
    """A model in float64, with uneven weights."""
    config, options, _ = HYBRIDS[name]
    if not hasattr(t, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    experts = {"experts_implementation": "eager"}  # the fast one takes no float64
    made = getattr(t, f"{name}ForCausalLM")._from_config(getattr(t, config)(**tiny.SIZES | options), **experts)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.double()


def assert_alike(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-15, name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@each_hybrid
def test_packed_documents_equal_the_same_documents_alone(name: str, lora: bool) -> None:
    """Logits and every gradient are the untouched model's; LFM2's also with checkpoints, which run layers again."""
    model: Any = model_of(name)
    if lora:
        refused = ["out_proj"] if name in ("FalconH1", "NemotronH") else None  # by peft
        options = {"target_modules": "all-linear", "exclude_modules": refused, "init_lora_weights": False}
        model = get_peft_model(model, LoraConfig(r=2, **options))
    with tiny.KeepFloat64():
        expected, expected_gradients = separately(model, tiny.packed(LENGTHS))
        placed = place(model, REFERENCE)
        mixers = 2 if name == "Zamba2" else 1
        assert {operation: placed[operation] for operation in HYBRIDS[name][2]} == dict.fromkeys(
            HYBRIDS[name][2], mixers
        )
        assert placed["packed_attention"] == 1
        if lora and name == "Lfm2":  # elsewhere a norm computes in float32 when it runs again
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        logits, gradients = together(model, tiny.packed(LENGTHS))
    assert_near(logits, expected, 1e-12)
    assert_alike(gradients, expected_gradients)


# The mixers of Qwen3.5 call the operations of Qwen3-Next's, those of Mamba 2 all do the same.
@pytest.mark.parametrize("name", ["Qwen3Next", "Lfm2", "FalconH1"])
def test_the_fast_kernels_are_as_close_to_float64_as_the_model(name: str) -> None:
    """Packed, all gradients' error is at most twice the untouched float32 model's own, and nothing leaks."""
    with tiny.KeepFloat64():
        _, truth = separately(model_of(name), tiny.packed(LENGTHS))
    model = model_of(name).float()
    _, own = separately(model, tiny.packed(LENGTHS))
    place(model, backends.resolve("fast"))
    _, found = together(model, tiny.packed(LENGTHS))
    assert 0 < error(found, truth) <= 2 * error(own, truth)
    batch = tiny.packed(LENGTHS)
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    begin, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    loss = model(inputs_embeds=embedded, **batch).logits[:, begin:end].square().sum()
    (gradient,) = torch.autograd.grad(loss, embedded)
    assert not gradient[:, :begin].any() and not gradient[:, end:].any()
    assert gradient[:, begin:end].any()


def error(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return sum((gradients[name] - gradient).norm().item() ** 2 for name, gradient in truth.items()) ** 0.5


@each_hybrid
def test_padded_batches_and_generation_are_those_of_the_model(name: str) -> None:
    model = model_of(name)
    tokens = torch.arange(3, 23).reshape(2, 10)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0

    def run() -> tuple[Tensor, dict[str, Tensor], Tensor]:
        model.zero_grad()
        labels = tokens.masked_fill(mask == 0, -100)
        outputs = model(tokens, attention_mask=mask, labels=labels, use_cache=False)
        outputs.loss.backward()
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        return outputs.loss.detach(), gradients_of(model), model.generate(tokens, **options)

    with tiny.KeepFloat64():
        expected = run()
        place(model, REFERENCE)
        loss, gradients, generated = run()
        remove(model)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-9)
    assert_alike(gradients, expected[1])
    assert torch.equal(generated, expected[2])
    assert not any("forward" in vars(module) for module in model.modules())


@each_hybrid
def test_hybrids_are_packed(name: str, tmp_path: Any) -> None:
    args = UnslothTrainingArguments(str(tmp_path), packing=True, use_cpu=True)
    plan = decide_batching(model_of(name), args, {"processing_class": object()})
    assert plan.packing and plan.padding_free and not plan.reasons


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("jamba", "JambaMambaMixer"),
    ],
)
def test_a_layer_that_carries_a_state_is_refused_by_name(name: str, layer: str, tmp_path: Any) -> None:
    args = UnslothTrainingArguments(str(tmp_path), packing=True, use_cpu=True)
    plan = decide_batching(zoo.empty(name), args, {"processing_class": object()})
    reason = f"the model has recurrent layers ({layer}), whose state would leak from one document into the next"
    assert not plan.packing and not plan.padding_free
    assert reason in plan.reasons


class Doubled(modeling_qwen3_5.Qwen3_5GatedDeltaNet):
    """Another rule under the same names."""

    def forward(self, hidden_states: Tensor, cache: Any = None, cache_params: Any = None, **options: Any) -> Any:
        """Twice the result, without a cache."""
        return 2 * super().forward(hidden_states, **options)


def test_a_mixer_that_differs_is_left_as_it_is(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = model_of("Qwen3_5")
    model.model.layers[0].linear_attn.__class__ = Doubled
    found = recognise_mixer(model.model.layers[0].linear_attn, {})
    assert isinstance(found, str) and found.startswith("differs from causal_conv and gated_delta_rule by 0.")
    with caplog.at_level("INFO", "unsloth_fast"):
        assert "gated_delta_rule" not in place(model, REFERENCE)
    assert "Doubled (differs from" in caplog.text
    args = UnslothTrainingArguments(str(tmp_path), packing=True, use_cpu=True)
    (reason, *_) = decide_batching(model, args, {"processing_class": object()}).reasons
    assert "recurrent layers (Doubled)" in reason


def test_a_convolution_with_a_hook_is_left_as_it_is() -> None:
    mixer: Any = model_of("Lfm2").model.layers[0].conv
    assert isinstance(recognise_mixer(mixer, {}), Mixer)
    mixer.conv.register_forward_hook(lambda *_: None)
    assert recognise_mixer(mixer, {}) == "hooks on its convolution"


@pytest.mark.parametrize("name", ["GraniteMoeHybrid", "Qwen3_5"])
def test_the_check_of_a_mixer_gives_no_advice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers advises to install mamba-ssm or another library for the forward that an operation replaces."""
    shown: list[Any] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda *words: shown.append(words))
    model = model_of(name)
    shown.clear()
    assert HYBRIDS[name][2][0] in place(model, REFERENCE)
    assert shown == []


def test_advice_that_a_check_silenced_still_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers gives it once in a process, and another call may need it."""
    logger: Any = t.utils.logging.get_logger("transformers.of_a_test")
    shown: list[str] = []
    monkeypatch.setattr(logger, "warning", shown.append)
    with quietly_on_the_cpu():
        logger.warning_once("install it")
    assert shown == []
    logger.warning_once("install it")
    assert shown == ["install it"]

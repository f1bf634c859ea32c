"""Merged models: plain transformers computes the same; 4-bit weights are dequantised once; the model stays as it is."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.models import zoo
from tests.models.adapted import adapted, assert_near, config_of, load, logits_of, merged, trained
from unsloth_fast import FastLanguageModel
from unsloth_fast.models.merging import merged_model
from unsloth_fast.save import hub

# The options of an adapter, and whether tied embeddings stay tied.
ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "LoRA": ({}, True),
    "DoRA": ({"use_dora": True}, True),
    "rsLoRA": ({"use_rslora": True}, True),
    "biases": ({"bias": "all"}, True),
    "both embeddings in full": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "one embedding in full": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False}, False),
    "trainable tokens": ({"trainable_token_indices": [3, 5]}, True),
    "LoRA on the embedding": ({"target_modules": ".*(embed_tokens|q_proj)"}, False),
    "DoRA on the embedding": ({"target_modules": ".*(embed_tokens|q_proj)", "use_dora": True}, False),
    "LoRA on the head": ({"target_modules": ".*(lm_head|q_proj)"}, False),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("family", "tied", "four"), [("llama", False, True), ("gemma3", True, False)])
def test_a_merged_model_computes_the_same(tmp_path: Path, name: str, family: str, tied: bool, four: bool) -> None:
    """It is merged in float32 and read by plain transformers; the model in memory keeps every bit."""
    options, stays_tied = ADAPTERS[name]
    model, _ = adapted(tiny.folder(tmp_path / "base", family, tie_word_embeddings=tied), four, **options)
    expected, before = logits_of(model), copy.deepcopy(model.state_dict())
    plain = merged(model, tmp_path / "merged")
    assert_near(logits_of(plain), expected)
    assert plain.config.tie_word_embeddings is (tied and stays_tied)
    assert "quantization_config" not in config_of(tmp_path / "merged")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_conv1d_is_merged_in_its_own_layout(tmp_path: Path, bits: str) -> None:
    """GPT-2's layers hold their weights transposed; bitsandbytes holds them as linear layers."""
    model, _ = load(zoo.folder(tmp_path / "base", "gpt2"), **{"load_in_4bit": None, bits: True})
    model = trained(FastLanguageModel.get_peft_model(model, r=4, target_modules=["c_attn", "c_proj", "c_fc"]))
    error = 2e-6 if bits == "load_in_4bit" else 0.05  # bitsandbytes rounds the inputs, too, in 8 bits
    assert_near(logits_of(merged(model, tmp_path / "merged")), logits_of(model), error)


def test_composite_modules_trained_in_full_are_merged(tmp_path: Path) -> None:
    model, _ = adapted(tiny.folder(tmp_path), target_modules=["q_proj"], modules_to_save=["mlp", "norm"])
    assert_near(logits_of(merged(model, tmp_path / "merged")), logits_of(model))


def two_adapters(folder: str, **options: Any) -> Any:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, **options))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj", "up_proj"], **options))
    for name in ("second", "default"):
        model.set_adapter(name)
        trained(model)
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_several_active_adapters_are_merged(tmp_path: Path, dora: bool) -> None:
    model = two_adapters(tiny.folder(tmp_path), use_dora=dora)
    alone = logits_of(model)
    model.base_model.set_adapter(["default", "second"])
    expected = logits_of(model)
    assert (expected - alone).abs().max() > 0.1
    assert_near(logits_of(merged(model, tmp_path / "merged")), expected)


def test_adapters_that_are_merged_or_disabled_are_not_added(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path)
    model, _ = adapted(folder, modules_to_save=["lm_head"])
    with model.disable_adapter():
        assert torch.equal(logits_of(merged(model, tmp_path / "merged")), logits_of(load(folder)[0]))
    expected = logits_of(model)
    model.merge_adapter()
    assert_near(logits_of(merged(model, tmp_path / "merged")), expected)


@pytest.mark.parametrize("base_bias", [True, False])
@pytest.mark.parametrize("four", [True, False])
def test_biases_of_the_adapter_are_merged(tmp_path: Path, base_bias: bool, four: bool) -> None:
    """They go into the layer's bias; peft's 4-bit layers do not scale them. A layer without a bias is refused."""
    folder = tiny.folder(tmp_path / "base", attention_bias=base_bias)
    model, _ = adapted(folder, four, target_modules=["q_proj", "o_proj"], lora_bias=True)
    if base_bias:
        assert_near(logits_of(merged(model, tmp_path / "merged")), logits_of(model))
    else:
        with pytest.raises(ValueError, match=r"cannot be merged .*base layer has no bias"):
            merged_model(model, torch.float32)


def test_adapters_of_expert_weights_are_merged(tmp_path: Path) -> None:
    """Each parameter has a wrapper of its own, one inside another."""
    config = transformers.MixtralConfig(
        **{"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    )
    torch.manual_seed(0)
    base = transformers.MixtralForCausalLM(config)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = trained(
        get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters, lora_dropout=0.0))
    )
    assert_near(logits_of(merged(model, tmp_path / "merged")), logits_of(model))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_4_bit_weights_are_dequantised_once_and_rounded_once(tmp_path: Path, adapter_dtype: torch.dtype) -> None:
    """They agree with the formula in float64; peft rounds the product of bfloat16 adapters to bfloat16."""
    model, tokenizer = load(
        tiny.folder(tmp_path / "base", dtype=torch.bfloat16), load_in_4bit=True, dtype=torch.bfloat16
    )
    model = trained(FastLanguageModel.get_peft_model(model, r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A") and layer.lora_A]
    assert len(layers) == 14
    for name, layer in layers:
        weight = layer.base_layer.weight
        low, high = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        exact = dequantize_4bit(weight.data, weight.quant_state).double() + layer.scaling["default"] * high @ low
        found = saved[f"{name.removeprefix('base_model.model.')}.weight"].double()
        unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)  # in the last of 8 bits
        assert ((found - exact).abs() <= 0.5 * unit + 1e-7 * exact.abs().max()).all()


@pytest.mark.parametrize(
    ("stored", "loaded", "asked", "largest", "expected"),
    [
        (torch.float32, torch.bfloat16, None, 1, torch.bfloat16),
        (torch.bfloat16, torch.float16, None, 1, torch.float16),
        (torch.bfloat16, torch.float32, None, 1, torch.bfloat16),
        (torch.float32, torch.float32, None, 1, torch.float16),
        (torch.float32, torch.float32, None, 1e5, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16, 1, torch.bfloat16),
    ],
)
def test_the_16_bits_are_those_of_the_model_or_its_checkpoint(
    tmp_path: Path, stored: Any, loaded: Any, asked: Any, largest: float, expected: torch.dtype
) -> None:
    """Without either they are float16, which rounds less, unless a weight is beyond its range."""
    model, _ = load(tiny.folder(tmp_path / "base", dtype=stored), dtype=loaded)
    model.lm_head.weight.data[0, 0] = largest
    model.save_pretrained_merged(str(tmp_path / "merged"), dtype=asked)
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {expected}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == expected
    if largest > 1:
        with pytest.raises(OverflowError, match=r"dtype: got torch.float16 and lm_head.weight of up to 1e\+05"):
            model.save_pretrained_merged(str(tmp_path / "merged"), dtype=torch.float16)


@pytest.mark.parametrize("method", ["merged_4bit", "merged_4bit_forced"])
def test_merged_4bit_quantises_the_merged_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Plain transformers loads 4-bit layers; they hold the merged weights as bitsandbytes quantises them."""
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"), four=True)
    model.save_pretrained_merged(tmp_path / "four", tokenizer, save_method=method)
    assert ("which loses accuracy" in caplog.text) is (method == "merged_4bit")
    model.save_pretrained_merged(tmp_path / "sixteen", tokenizer)
    four = AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in four.modules()) == 14
    sixteen = AutoModelForCausalLM.from_pretrained(tmp_path / "sixteen", dtype=torch.float32)
    weight = four.model.layers[0].mlp.up_proj.weight
    found = dequantize_4bit(weight.data, weight.quant_state).float().cpu()
    exact = sixteen.model.layers[0].mlp.up_proj.weight
    assert (found - exact).abs().max() < 0.2 * exact.abs().max()
    assert (tmp_path / "four" / "tokenizer.json").exists()


def test_the_adapter_alone_is_saved(tmp_path: Path) -> None:
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))
    model.save_pretrained_merged(str(tmp_path / "lora"), tokenizer, save_method="lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    again, _ = load(str(tmp_path / "lora"))
    assert torch.equal(logits_of(FastLanguageModel.for_inference(again)), logits_of(model))
    again.save_pretrained_merged(str(tmp_path / "merged"))
    assert_near(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")).float(), logits_of(model), 2e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"save_method": "16bit"}, ValueError, "save_method: got '16bit'; allowed: 'merged_16bit'"),
        ({"save_method": "lora"}, ValueError, "save_method: got 'lora' for a LlamaForCausalLM; allowed"),
        ({"dtype": torch.float32}, ValueError, "dtype: got torch.float32; allowed: "),
        ({"method": "lora"}, TypeError, "save_pretrained_merged: got keyword 'method'; allowed"),
        ({"push_to_hub": True}, ValueError, r"push_to_hub: got True; allowed: False, None, as push_to_hub_merged\("),
        ({"state_dict": {}}, ValueError, "state_dict: got a dict; allowed: None, as the model's own weights"),
        ({"save_peft_format": False}, ValueError, "save_peft_format: got False; allowed: True, None, as adapters"),
        ({"variant": "fp16"}, ValueError, "variant: got 'fp16'; allowed: None"),
    ],
)
def test_unknown_ways_to_save_are_refused(tmp_path: Path, options: Any, error: type, message: str) -> None:
    model, _ = load(tiny.folder(tmp_path / "base"))
    with pytest.raises(error, match=message):
        model.save_pretrained_merged(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    model.save_pretrained_merged(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


# The defaults of Unsloth's own parameters behind save_method and quantization_method.
UNSLOTH_DEFAULTS: dict[str, Any] = {
    "is_main_process": True,
    "state_dict": None,
    "save_function": torch.save,
    "max_shard_size": "5GB",
    "safe_serialization": True,
    "variant": None,
    "save_peft_format": True,
    "tags": None,
    "temporary_location": "_unsloth_temporary_saved_buffers",
    "maximum_memory_usage": 0.75,
    "datasets": None,
}


def test_keywords_that_ask_for_nothing_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method on disk and the one for the hub accept them and write the same files."""
    model, tokenizer = load(tiny.folder(tmp_path / "base"))
    own = {"push_to_hub": False, "token": "", "private": None}
    model.save_pretrained_merged(tmp_path / "out", tokenizer, **own, **UNSLOTH_DEFAULTS)
    monkeypatch.setattr(hub, "create_repository", lambda repo_id, *_: repo_id)
    monkeypatch.setattr(hub, "upload_folder", lambda _, folder, **__: sorted(p.name for p in Path(folder).iterdir()))
    files = model.push_to_hub_merged("me/name", tokenizer, use_temp_dir=None, token=None, **UNSLOTH_DEFAULTS)
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir()) and "model.safetensors" in files


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    model, _ = load(tiny.folder(tmp_path))
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model: got NaN or infinite values in lm_head"):
        merged_model(model, torch.float16)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="model: got a weight 'weight' that is offloaded"):
        merged_model(model, torch.float16)
    alora = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3]))
    with pytest.raises(
        ValueError, match=r"the adapter default, which cannot be merged \(.*\); allowed: save_method='lora'"
    ):
        merged_model(alora, torch.float16)

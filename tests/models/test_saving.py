"""Merged models load in plain transformers with the same logits; what is saved is what was loaded; adapters return."""

import copy
import json
import pickle
import stat
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import unsloth_fast.save
from tests import tiny
from tests.trainer.runs import arguments
from unsloth_fast import FastLanguageModel, UnslothTrainer
from unsloth_fast.models import generation
from unsloth_fast.models.auto import accept_bits, refuse_bits
from unsloth_fast.models.merging import merged_model

pytestmark = pytest.mark.usefixtures("unpatched")

TOKENS = torch.tensor([[4, 8, 5, 9, 6, 12, 30]])
PLAIN: dict[str, Any] = {"load_in_4bit": False, "backend": "reference", "device_map": "cpu", "dtype": torch.float32}


def load(folder: str, **options: Any) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(folder, **PLAIN | options)


def trained(model: Any) -> Any:
    """The model with noise on its trained parameters, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape, generator=generator)
    return FastLanguageModel.for_inference(model)


def adapted(folder: str, four: bool = False, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = load(folder, load_in_4bit=four)
    return trained(FastLanguageModel.get_peft_model(model, r=4, **options)), tokenizer


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits.cpu()


def assert_near(found: Tensor, expected: Tensor, error: float = 2e-6) -> None:
    assert (found - expected).abs().max() <= error * expected.abs().max()


def merged(model: Any, folder: Path) -> Any:
    """The model merged in float32, saved, and loaded by plain transformers."""
    merged_model(model, torch.float32).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


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
    """Merged in float32 and read by plain transformers; the model in memory keeps every bit."""
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
    """Into the layer's bias; peft's 4-bit layers do not scale them. A layer without one is refused."""
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
    """Against the formula in float64; peft rounds the product of bfloat16 adapters to bfloat16."""
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
    ],
)
def test_unknown_ways_to_save_are_refused(tmp_path: Path, options: Any, error: type, message: str) -> None:
    model, _ = load(tiny.folder(tmp_path / "base"))
    with pytest.raises(error, match=message):
        model.save_pretrained_merged(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    model.save_pretrained_merged(tmp_path / "out", maximum_memory_usage=0.75, temporary_location="x")
    model.save_pretrained_merged(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


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


# The configuration that was loaded


def check_config(folder: Path, base: str) -> None:
    """The saved configuration is the loaded one, and the saved model generates with a cache if the loaded one did."""
    loaded, saved = config_of(Path(base)), config_of(folder)
    # transformers' Trainer aligns the begin token with the tokenizer's in releases before 5.24.
    others = ("transformers_version", "_name_or_path", "dtype", "bos_token_id")
    assert {key for key in {*loaded, *saved} - {*others} if loaded.get(key) != saved.get(key)} == set()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("way", ["for_training", "trainer", "trainer, plain model", "trainer, path", "merged", "peft"])
def test_the_saved_configuration_is_the_loaded_one(tmp_path: Path, way: str, use_cache: bool) -> None:
    """Training turns the key-value cache off, in this package and in transformers."""
    base = tiny.folder(tmp_path / "base", use_cache=use_cache)
    out = tmp_path / "out"
    model, tokenizer = load(base)
    if way in ("merged", "peft"):
        model = FastLanguageModel.get_peft_model(model, r=4)
    if "plain" in way:
        model = AutoModelForCausalLM.from_pretrained(base)
    if "trainer" in way or way == "peft":
        data = Dataset.from_dict({"text": tiny.texts(4)})
        start = base if "path" in way else model
        options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "backend": "reference"}
        options |= {"bf16": False, "use_cpu": True}
        trainer = UnslothTrainer(start, arguments(tmp_path, **options), train_dataset=data, processing_class=tokenizer)
        trainer.train()
        model = trainer.model
    if way == "peft":
        model = model.merge_and_unload()
    if way == "merged":
        model.save_pretrained_merged(out, tokenizer)
    else:
        model.save_pretrained(out)
    check_config(out, base)
    if way == "for_training":
        FastLanguageModel.for_training(model).save_pretrained(out)
        check_config(out, base)
        assert not model.config.use_cache
        FastLanguageModel.for_inference(model).save_pretrained(out)
        check_config(out, base)


# Tokens added by the user


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ".*(embed_tokens|lm_head|q_proj)"},
        {"trainable_token_indices": [48, 49]},
    ],
    ids=["LoRA", "both", "embedding", "LoRA on both", "trainable tokens"],
)
def test_an_adapter_with_added_tokens_is_loaded_again(
    tmp_path: Path, tied: bool, four: bool, options: dict[str, Any]
) -> None:
    """The base model is resized to the adapter's tokens; merged, it is read by plain transformers."""
    base = tiny.folder(tmp_path / "base", tie_word_embeddings=tied)
    model, tokenizer = load(base, load_in_4bit=four)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    model.resize_token_embeddings(len(tokenizer))
    model = trained(FastLanguageModel.get_peft_model(model, r=4, **options))
    tokens = torch.tensor([[4, 48, 5, 49, 6, 48]])
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, tokenizer = load(str(tmp_path / "adapter"), load_in_4bit=four)
    FastLanguageModel.for_inference(again)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
        assert len(tokenizer) == 50 and tokenizer.convert_tokens_to_ids("<new2>") == 49
        plain = merged(again, tmp_path / "merged")
        assert_near(plain(tokens).logits, expected)
    assert plain.config.vocab_size == 50


@pytest.mark.parametrize(("rows", "saved"), [(56, ["embed_tokens"]), (40, ["lm_head"]), (56, None)])
def test_a_vocabulary_of_another_size_than_the_tokenizers_is_loaded_again(
    tmp_path: Path, rows: int, saved: list[str] | None
) -> None:
    """The adapter's weights show the size: padded beyond the tokenizer's tokens, or cut below them."""
    model, tokenizer = load(tiny.folder(tmp_path / "base"), resize_model_vocab=rows)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == model.config.vocab_size == rows
    model = trained(FastLanguageModel.get_peft_model(model, r=4, modules_to_save=saved))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, _ = load(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again.eval()), logits_of(model))


def test_an_adapter_that_names_more_tokens_than_the_model_gets_rows_for_them(tmp_path: Path) -> None:
    """Also where it holds no weights of the embeddings; one with fewer tokens changes nothing."""
    base = tiny.folder(tmp_path / "base", vocab_size=60)
    model, tokenizer = load(base)
    FastLanguageModel.get_peft_model(model, r=4).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for count, expected in ((0, 60), (20, 68)):
        tokenizer.add_tokens([f"<{index}>" for index in range(count)])
        tokenizer.save_pretrained(tmp_path / "adapter")
        assert load(str(tmp_path / "adapter"))[0].get_input_embeddings().num_embeddings == expected


def test_a_vocabulary_below_1_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.folder(tmp_path)
    with pytest.raises(ValueError, match="resize_model_vocab: got 0"):
        load(folder, resize_model_vocab=0)
    load(folder, resize_model_vocab=40)
    assert "resize_model_vocab: got 40, fewer than the tokenizer's 48 tokens" in caplog.text


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"load_in_4bit": True}, bitsandbytes.nn.Linear4bit),
        ({"load_in_8bit": True}, bitsandbytes.nn.Linear8bitLt),
        ({"load_in_4bit": False}, nn.Linear),
        ({}, nn.Linear),
    ],
)
def test_pefts_own_loader_takes_load_in_4bit(tmp_path: Path, options: dict[str, bool], kind: type) -> None:
    """As scripts for older releases call it."""
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    accept_bits()
    found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32, **options)
    assert type(found.base_model.model.model.layers[0].mlp.up_proj.base_layer) is kind
    assert_near(logits_of(found.eval()), logits_of(model), 0.3 if any(options.values()) else 1e-6)
    refuse_bits()
    with pytest.raises(TypeError, match="load_in_4bit"):
        AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), load_in_4bit=True)


def test_functions_of_unsloths_names_save(tmp_path: Path) -> None:
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))
    unsloth_fast.save.unsloth_save_model(model, tokenizer, tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert unsloth_fast.save.patch_saving_functions(plain) is plain
    plain.save_pretrained_merged(tmp_path / "plain", dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dtype == torch.bfloat16


# The hub and llama.cpp


class Hub:
    """Records what is uploaded."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], set[str]]] = []

    def __call__(self, token: str | None = None) -> "Hub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create", {"repo_id": repo_id, **options}, set()))
        return type("Repository", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, folder_path: str, **options: Any) -> str:
        self.calls.append(("upload", options, {path.name for path in Path(folder_path).iterdir()}))
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(unsloth_fast.save, "HfApi", made)
    return made


@pytest.mark.parametrize("method", ["merged_16bit", "lora"])
def test_a_model_is_pushed_to_the_hub(tmp_path: Path, hub: Hub, method: str) -> None:
    model, tokenizer = adapted(tiny.folder(tmp_path))
    address = model.push_to_hub_merged("repo", tokenizer, save_method=method, token="secret", private=True)
    (_, repository, _), (_, upload, files) = hub.calls
    assert (address, hub.token) == ("https://hub/commit", "secret")
    assert repository == {"repo_id": "repo", "private": True, "exist_ok": True} and upload["repo_id"] == "me/repo"
    assert {"model.safetensors" if method == "merged_16bit" else "adapter_model.safetensors", "tokenizer.json"} <= files


def program(folder: Path, name: str, lines: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(lines)
    (folder / name).chmod(stat.S_IRWXU)


CONVERTER = """
import json, pathlib, sys
source, _, target, _, kind = sys.argv[1:]
assert (pathlib.Path(source) / "model.safetensors").exists() and (pathlib.Path(source) / "tokenizer.json").exists()
if kind == "f32": sys.exit("no such type")
pathlib.Path(target).write_text(kind)
"""
QUANTIZER = """#!/bin/sh
echo "$3 of $(cat $1)" > $2
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs that write what they were asked for."""
    folder = tmp_path / "llama.cpp"
    program(folder, "convert_hf_to_gguf.py", CONVERTER)
    program(folder / "build" / "bin", "llama-quantize", QUANTIZER)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    return folder


def test_gguf_files_are_written_by_llama_cpp(tmp_path: Path, llama_cpp: Path) -> None:
    """Each method once; llama-quantize starts from the 16 bits that were saved."""
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))
    paths = model.save_pretrained_gguf(str(tmp_path / "out"), tokenizer, quantization_method="q8_0")
    assert paths == [str(tmp_path / "out" / "out.Q8_0.gguf")] and Path(paths[0]).read_text() == "q8_0"
    methods = ["q4_k_m", "quantized", "not_quantized"]
    paths = model.save_pretrained_gguf(str(tmp_path / "two"), None, quantization_method=methods)
    assert [Path(path).name for path in paths] == ["two.Q4_K_M.gguf", "two.F16.gguf"]
    assert Path(paths[0]).read_text().strip() == "Q4_K_M of f16"
    assert len(list((tmp_path / "two").glob("*.gguf"))) == 2
    with pytest.raises(RuntimeError, match=r"llama.cpp: .* ended with status 1:\nno such type"):
        model.save_pretrained_gguf(str(tmp_path / "three"), tokenizer, quantization_method="f32")


def test_gguf_files_are_pushed_to_the_hub(tmp_path: Path, hub: Hub, llama_cpp: Path) -> None:
    """Without the file that llama-quantize started from, which was not asked for."""
    model, tokenizer = adapted(tiny.folder(tmp_path / "base"))
    model.push_to_hub_gguf("me/name", tokenizer, quantization_method="q5_k_m", token="secret")
    (_, upload, files) = hub.calls[1]
    assert {name for name in files if name.endswith(".gguf")} == {"name.Q5_K_M.gguf"}
    assert upload["allow_patterns"] == "*.gguf"


def test_without_llama_cpp_the_commands_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is merged."""
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "")
    model, tokenizer = load(tiny.folder(tmp_path / "base"))
    direct = r"python convert_hf_to_gguf.py model --outfile model.q8_0.gguf --outtype q8_0"
    with pytest.raises(RuntimeError, match=rf"save_pretrained_merged\('model', tokenizer\) and run: {direct}$"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer)
    program(tmp_path / "bin", "convert_hf_to_gguf.py", CONVERTER)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(RuntimeError, match=r"llama-quantize is neither .*llama-quantize model.bf16.gguf .* Q4_K_M$"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q4_k_m")
    with pytest.raises(ValueError, match="quantization_method: got 'q9'; allowed: f32, f16"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, ["q8_0", "q9"])
    assert not (tmp_path / "out").exists()


# Methods and generation


@pytest.mark.parametrize("adapter", [False, True])
def test_a_deep_copys_methods_are_its_own(tmp_path: Path, adapter: bool) -> None:
    model, _ = load(tiny.folder(tmp_path))
    names = list(tiny.model().state_dict())
    assert list(model.state_dict()) == names
    model = FastLanguageModel.get_peft_model(model, r=4) if adapter else model
    other = copy.deepcopy(model)
    trained(other)
    assert other.for_inference() is other and not other.training and model.training
    assert not any(module.training for module in other.modules())
    assert other.for_training() is other and all(module.training for module in other.modules())
    other.save_pretrained_merged(tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_near(logits_of(found), logits_of(other.eval()), 3e-3)
    assert (logits_of(other) - logits_of(model.eval())).abs().max() > 0.05


class Owner(nn.Module):
    """A module that can be pickled."""


def test_methods_can_be_pickled() -> None:
    owner = Owner()
    unsloth_fast.save._bind(owner, {"pad": generation.pad_left, "train": FastLanguageModel.for_training})
    again = pickle.loads(pickle.dumps(owner))
    assert again.pad.args == (again,) and again.pad.func is generation.pad_left
    assert again.pad.__doc__ == generation.pad_left.__doc__


@pytest.mark.parametrize("adapter", [False, True])
def test_generate_takes_what_a_tokenizer_returns(tmp_path: Path, adapter: bool) -> None:
    """By position, as input_ids or unpacked; other arguments replace what it holds."""
    folder = tiny.folder(tmp_path)
    model, tokenizer = adapted(folder) if adapter else load(folder)
    FastLanguageModel.for_inference(model)
    batch = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = merged(model, tmp_path / "merged")
    expected = plain.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    assert torch.equal(model.generate(**batch, **options), expected)
    assert torch.equal(model.generate(batch, **options), expected)
    assert torch.equal(model.generate(inputs=batch, **options), expected)
    assert torch.equal(model.generate(input_ids=batch, **options), expected)
    assert torch.equal(model.generate(input_ids=batch, token_type_ids=batch["input_ids"], **options), expected)
    other = torch.ones_like(batch["input_ids"])
    assert torch.equal(
        model.generate(input_ids=batch, attention_mask=other, **options),
        plain.generate(batch["input_ids"], attention_mask=other, **options),
    )


def test_chat_templates_and_streamers_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(tiny.folder(tmp_path))
    model.for_inference()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    messages = [{"role": "user", "content": "w1 w2 w3"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", add_generation_prompt=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    out = model.generate(input_ids=ids, streamer=streamer, **options)
    assert out.shape == (1, 7)
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0, 3:]).split()
    assert torch.equal(model.generate(ids, **options), out)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_tokenizer_pads_on_the_left_for_inference_alone(tmp_path: Path, side: str) -> None:
    """Whichever side was set before is set again for training."""
    model, tokenizer = load(tiny.folder(tmp_path))
    model = FastLanguageModel.get_peft_model(model, r=4)
    tokenizer.padding_side = side
    for _ in range(2):
        FastLanguageModel.for_inference(model)
        assert tokenizer.padding_side == "left"
    FastLanguageModel.for_training(model)
    assert tokenizer.padding_side == side

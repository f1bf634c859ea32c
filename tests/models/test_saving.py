"""What is saved is what was loaded: the configuration, added tokens; scripts for older releases load it."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig

import unsloth_fast.save
from tests import tiny
from tests.models import zoo
from tests.models.adapted import adapted, assert_near, config_of, load, logits_of, merged, trained
from tests.trainer.runs import arguments
from unsloth_fast import FastLanguageModel, UnslothTrainer
from unsloth_fast.models.auto import accept_bits, refuse_bits


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


@pytest.mark.parametrize("way", ["loaded", "plain model", "path", "plain model, LoRA"])
def test_a_trained_expert_model_generates_and_is_saved_without_trls_balancing(tmp_path: Path, way: str) -> None:
    """TRL turns on the router's logits, with which transformers fails on padded prompts with a cache."""
    base = zoo.folder(tmp_path / "base", "qwen3_moe")
    model, tokenizer = load(base) if way == "loaded" else (AutoModelForCausalLM.from_pretrained(base), tiny.tokenizer())
    model = base if way == "path" else model
    options = {"max_steps": 1, "backend": "reference", "bf16": False, "use_cpu": True}
    balances = hasattr(SFTConfig, "router_aux_loss_coef")  # not in older releases of TRL
    options |= {"router_aux_loss_coef": 0.5} if balances else {}
    if way == "plain model, LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    data = Dataset.from_dict({"text": tiny.texts(4)})
    trainer = UnslothTrainer(model, arguments(tmp_path, **options), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert not balances or trainer.state.log_history[0]["aux_loss"] > 0
    model, tokenizer.padding_side = trainer.model.eval(), "left"
    balanced = model.config.output_router_logits
    assert balanced is False
    if way == "loaded":
        FastLanguageModel.for_inference(model)
    prompts = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)
    found = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    assert model.config.output_router_logits is balanced
    if way == "plain model, LoRA":
        model = model.merge_and_unload()
        model.save_pretrained(tmp_path / "out")
    else:
        trainer.save_model(tmp_path / "out")
    check_config(tmp_path / "out", base)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain.generate(**prompts, max_new_tokens=4, do_sample=False), found)


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
    """It gets them also where it holds no weights of the embeddings; one with fewer tokens changes nothing."""
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
    """Scripts for older releases pass it."""
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

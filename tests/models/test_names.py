"""The names that scripts for Unsloth import: from the package and its modules, or refused with the reason."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import unsloth_fast
from tests import tiny
from unsloth_fast import FastLanguageModel, devices, tokenizer_utils

REFUSED = {
    "FastVisionModel": "images are not trained on here; FastModel trains the text part",
    "UnslothVisionDataCollator": "images are not trained on here",
    "PatchFastRL": "there is no GRPO",
    "vLLMSamplingParams": "vLLM is not used here",
    "FastSentenceTransformer": "sentence embeddings are not trained here",
}


def test_every_name_is_there() -> None:
    """All loaders are one class, and `from unsloth_fast import *` works."""
    for name in unsloth_fast.__all__:
        assert getattr(unsloth_fast, name) is not None, name
    loaders = [name for name in unsloth_fast.__all__ if name.startswith("Fast")]
    assert len(loaders) >= 15
    assert all(getattr(unsloth_fast, name) is FastLanguageModel for name in loaders)
    assert unsloth_fast.PatchDPOTrainer() is None
    assert not unsloth_fast.is_vLLM_available()
    assert unsloth_fast.__version__


@pytest.mark.parametrize(
    "module", ["unsloth_fast", "unsloth_fast.models", "unsloth_fast.trainer", "unsloth_fast.dataprep"]
)
@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED)
def test_what_stays_out_is_refused_at_the_import(module: str, name: str, reason: str) -> None:
    with pytest.raises(ImportError, match=f"^{name}: {reason}.*; allowed: training on text with FastLanguageModel$"):
        exec(f"from {module} import {name}")


@pytest.mark.parametrize(
    ("name", "instead"),
    [("construct_chat_template", "apply_chat_template"), ("create_ollama_modelfile", "save_pretrained_gguf")],
)
def test_what_has_another_name_here_is_refused_at_the_import(name: str, instead: str) -> None:
    for module in ("unsloth_fast", "unsloth_fast.chat_templates"):
        with pytest.raises(ImportError, match=f"^{name}: .*; allowed: {instead}"):
            exec(f"from {module} import {name}")


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/model", "a/b/c", "nowhere/"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"model_name: got '{name}', which does not exist .*; allowed: the "):
        FastLanguageModel.from_pretrained(name)


@pytest.mark.parametrize("inside", [[], ["checkpoint-4"]])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, inside: list[str]) -> None:
    for name in inside:
        (tmp_path / name).mkdir()
    words = r"\['checkpoint-4'\]" if inside else "no checkpoint"
    with pytest.raises(FileNotFoundError, match=f"without config.json or adapter_config.json; allowed: .*{words}"):
        FastLanguageModel.from_pretrained(str(tmp_path))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(unsloth_fast, "FastLanguageModell")
    with pytest.raises(ImportError, match="cannot import name 'FastLanguageModell'"):
        exec("from unsloth_fast import FastLanguageModell")


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("trainer", ["UnslothTrainer", "UnslothTrainingArguments", "unsloth_train"]),
        ("tokenizer_utils", ["load_correct_tokenizer", "add_new_tokens", "check_tokenizer"]),
        ("save", ["unsloth_save_model", "patch_saving_functions"]),
        ("models", ["FastLanguageModel", "FastModel", "FastLlamaModel", "FastMistralModel", "FastQwen2Model"]),
        ("chat_templates", ["get_chat_template", "train_on_responses_only"]),
    ],
)
def test_modules_have_the_names_that_scripts_import(module: str, names: list[str]) -> None:
    found = import_module(f"unsloth_fast.{module}")
    assert all(callable(getattr(found, name)) for name in names)


def test_importing_the_package_loads_no_library() -> None:
    """It loads no library of Hugging Face, no triton and no torch; a refused name needs none either."""
    code = """
import sys, unsloth_fast
try:
    from unsloth_fast import FastVisionModel
except ImportError as error:
    assert "images" in str(error), error
libraries = {"triton", "transformers", "trl", "peft", "datasets", "torch", "bitsandbytes"}
assert not libraries & set(sys.modules), libraries & set(sys.modules)
from unsloth_fast import is_bfloat16_supported
assert not {"transformers", "trl", "peft"} & set(sys.modules)
"""
    root = Path(unsloth_fast.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("gpu", "has", "expected"), [(False, False, True), (True, True, True), (True, False, False)])
def test_bfloat16_is_supported_on_every_cpu_and_some_gpus(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, has: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert devices.is_bfloat16_supported() is expected
    assert unsloth_fast.is_bf16_supported() is expected


def test_tokens_are_added_with_rows_for_them() -> None:
    """Known tokens are not added again; the other rows do not change, and neither does a larger embedding."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    before = model.get_input_embeddings().weight.clone()
    tokenizer_utils.add_new_tokens(model, tokenizer, ["<think>", "w1", "</think>"])
    assert len(tokenizer) == len(tiny.WORDS) + 2
    after = model.get_input_embeddings().weight
    assert torch.equal(after[: len(before)], before) and len(after) == len(model.lm_head.weight) == len(tokenizer)
    model.resize_token_embeddings(64)
    tokenizer_utils.add_new_tokens(model, tokenizer, ["<tool>"])
    assert model.get_input_embeddings().num_embeddings == 64
    for tokens, method in (([], "mean"), ("<a>", "mean"), (["<a>"], "interpolation")):
        with pytest.raises(ValueError, match=r"new_tokens: got|method: got 'interpolation'"):
            tokenizer_utils.add_new_tokens(model, tokenizer, tokens, method)
    adapted = FastLanguageModel.get_peft_model(model, r=2)
    with pytest.raises(ValueError, match="model: got one with an adapter; allowed: one without"):
        tokenizer_utils.add_new_tokens(adapted, tokenizer, ["<a>"])


def test_a_tokenizer_is_loaded_by_its_name(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    found = tokenizer_utils.load_correct_tokenizer(str(tmp_path), 77, padding_side="left")
    assert (found.model_max_length, found.padding_side) == (77, "left")
    assert tokenizer_utils.check_tokenizer(nn.Linear(1, 1), found) is found

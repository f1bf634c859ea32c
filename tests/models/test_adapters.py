"""FastLanguageModel.get_peft_model: which weights it trains, saving and loading adapters, and refused arguments."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.models.adapted import TOKENS, load, loss_and_gradients, stepped, trained_names
from unsloth_fast import FastLanguageModel


def test_an_adapter_goes_on_the_seven_linear_layers(tmp_path: Path) -> None:
    """Nothing else is trained; the seed determines the weights and does not change the global generator."""
    folder = tiny.folder(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    models = [FastLanguageModel.get_peft_model(load(folder)[0], random_state=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    names = trained_names(models[0])
    assert len(names) == 2 * 7 * 2
    assert {name.split(".")[4] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    weights = [dict(model.named_parameters())[f"base_model.model.{min(names)}"] for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].shape[0] == 16 and models[0].training and not models[0].config.use_cache
    assert models[0].max_seq_length == 64


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_embeddings_among_the_targets_are_trained_in_full_and_stay_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, tied: bool
) -> None:
    """The saved adapter loads in plain peft, and merges up to float64's rounding."""
    caplog.set_level(logging.INFO)
    folder = tiny.folder(tmp_path / "base", family, torch.float64, tie_word_embeddings=tied)
    names = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    model, _ = load(folder, dtype=torch.float64)
    options = {"target_modules": names, "use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(model.double(), **options)  # buffers too
    assert "embed_tokens, lm_head: trained in full" in caplog.text
    whole = {name for name in trained_names(model) if "lora" not in name}
    head = set() if tied else {"lm_head.modules_to_save.default.weight"}
    assert whole == {"model.embed_tokens.modules_to_save.default.weight"} | head
    with tiny.KeepFloat64():
        logits = stepped(model)(TOKENS).logits
        model.save_pretrained(tmp_path / "adapter")
        same = {"dtype": torch.float64, "attn_implementation": model.config._attn_implementation}
        base = AutoModelForCausalLM.from_pretrained(folder, **same).double()
        before = base(TOKENS).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        assert (logits - before).abs().max() > 1e-2
        torch.testing.assert_close(loaded(TOKENS).logits, logits, rtol=1e-12, atol=1e-13)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-12, atol=1e-13)
        own = model.merge_and_unload()
        torch.testing.assert_close(own(TOKENS).logits, logits, rtol=1e-12, atol=1e-13)
    if tied:
        assert merged.lm_head.weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
def test_weights_trained_on_a_float16_model_in_4_bits_are_float32(tmp_path: Path, tied: bool) -> None:
    """Loss scaling refuses float16 gradients. The model runs with and without autocast."""
    folder = tiny.folder(tmp_path, tie_word_embeddings=tied)
    model, _ = load(folder, load_in_4bit=True, dtype=torch.float16)
    model = FastLanguageModel.get_peft_model(model, modules_to_save=["embed_tokens", "lm_head"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.float16):
        _, gradients = loss_and_gradients(model)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert FastLanguageModel.for_inference(model)(TOKENS).logits.isfinite().all()


def test_trained_float16_weights_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    FastLanguageModel.get_peft_model(tiny.model(dtype=torch.float16), modules_to_save=["lm_head"])
    assert "allowed: dtype=torch.float32; base_model.model.lm_head.modules_to_save" in caplog.text


def test_an_adapter_is_loaded_with_its_base_model_and_can_be_trained_further(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "base")
    model = stepped(FastLanguageModel.get_peft_model(load(folder)[0], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = load(str(tmp_path / "adapter"))
    assert torch.equal(loaded.eval()(TOKENS).logits, model(TOKENS).logits)
    assert trained_names(loaded) == trained_names(model)
    assert "forward" in vars(loaded.get_base_model().model.layers[0].self_attn)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_an_adapter_on_4_bits_gives_the_same_logits_here_and_in_plain_peft(tmp_path: Path) -> None:
    """They agree to float32's rounding in training mode; in evaluation mode bitsandbytes may repack the weights."""
    folder = tiny.folder(tmp_path / "base")
    model, _ = load(folder, load_in_4bit=True)
    before, quantization = model(TOKENS).logits, model.config.quantization_config
    model = stepped(FastLanguageModel.get_peft_model(model)).train()
    model.save_pretrained(tmp_path / "adapter")
    options = {"quantization_config": quantization, "dtype": torch.float32, "device_map": "cpu"}
    plain = AutoModelForCausalLM.from_pretrained(folder, **options)
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    own, _ = load(str(tmp_path / "adapter"), load_in_4bit=True)
    logits = model(TOKENS).logits
    assert (logits - before).abs().max() > 1e-2
    for loaded in (plain, own):
        torch.testing.assert_close(loaded.train()(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: got 0"),
        ({"r": 4.0}, ValueError, "r: got 4.0; allowed: a whole number from 1"),
        ({"lora_alpha": "16"}, ValueError, "lora_alpha: got '16'; allowed: a finite number"),
        ({"lora_dropout": "0"}, ValueError, "lora_dropout: got '0'; allowed: a finite number"),
        ({"random_state": None}, ValueError, "random_state: got None; allowed: a whole number"),
        ({"use_rslora": "False"}, ValueError, "use_rslora: got 'False'; allowed: True, False"),
        ({"layers_to_transform": [0, 2]}, ValueError, "layers_to_transform: got 2; allowed: layers, 0 to 1"),
        ({"target_modules": 5}, ValueError, "target_modules: got 5; allowed: a list of names, a pattern, or None"),
        ({"modules_to_save": "lm_head"}, ValueError, "modules_to_save: got 'lm_head'; allowed: a list of names"),
        ({"rank_pattern": {"q_proj": "8"}}, ValueError, r"rank_pattern\['q_proj'\]: got '8'; allowed: a finite"),
        ({"max_seq_length": "32"}, ValueError, "max_seq_length: got '32'; allowed: a whole number from 1"),
        ({"trainable_token_indices": [5, 48]}, ValueError, "trainable_token_indices: got 48; allowed: .*, 0 to 47"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, ValueError, r"trainable_token_indices\['lm_head'\]: got -1"),
        ({"trainable_token_indices": {"wte": [1]}}, ValueError, "trainable_token_indices: got .* 'wte'; .* 'embed_tok"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: got 1.0"),
        ({"bias": "some"}, ValueError, "bias: got 'some'"),
        ({"use_gradient_checkpointing": "yes"}, ValueError, "use_gradient_checkpointing: got 'yes'"),
        (
            {"target_modules": ["c_attn"]},
            ValueError,
            r"target_modules: got \['c_attn'\], of which the .*; allowed: .*q_proj",
        ),
        (
            {"finetune_vision_layers": True},
            ValueError,
            "finetune_vision_layers: got True; allowed: False, None",
        ),
        ({"finetune_language_layers": False}, ValueError, "target_modules: got .* none is left in the parts"),
        ({"task_type": "SEQ_CLS"}, ValueError, "task_type: got 'SEQ_CLS'; allowed: None, 'CAUSAL_LM'"),
        ({"target_modules": ["lm_head"]}, ValueError, r"target_modules: got only \['lm_head'\]; allowed: .*q_proj"),
        ({"modules_to_save": ["score"]}, ValueError, "modules_to_save: got 'score'"),
        ({"max_seq_length": 100}, ValueError, "max_seq_length: got 100; allowed: 1 to 64"),
        ({"qat_scheme": "int4"}, ValueError, "qat_scheme: got 'int4'; allowed: None"),
        ({"rank": 8}, TypeError, "get_peft_model: got keyword 'rank'"),
        ({"peft_type": "PREFIX_TUNING"}, TypeError, "get_peft_model: got keyword 'peft_type'"),
    ],
)
def test_invalid_adapters_are_refused(options: dict[str, Any], error: type, message: str) -> None:
    model = tiny.model()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        FastLanguageModel.get_peft_model(model, **options)
    assert [name for name, _ in model.named_modules()] == before


def test_parameters_are_accepted_in_unsloths_order(tmp_path: Path) -> None:
    rest = (0.0, "none", None, None, "unsloth", 3407, 64, False, None, True, {}, str(tmp_path / "temporary"), None)
    model = FastLanguageModel.get_peft_model(tiny.model(), 8, ["q_proj"], 16, *rest)
    assert {parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name} == {8}
    assert not list(tmp_path.iterdir())

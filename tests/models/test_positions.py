"""Texts beyond a model's positions: RoPE is scaled by transformers, which is logged, or the length is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

from tests import tiny
from tests.models import zoo
from tests.models.adapted import TOKENS, load
from tests.trainer.runs import arguments
from unsloth_fast import FastLanguageModel, UnslothTrainer
from unsloth_fast.models import positions


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_is_scaled_by_the_length_over_the_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    """Position 2 i of the scaled model is position i of the plain one, up to float64's rounding."""
    folder = tiny.folder(tmp_path, family, torch.float64)
    model, tokenizer = load(folder, max_seq_length=128, dtype=torch.float64)
    assert "max_seq_length: 128 is beyond the model's 64 positions: RoPE is scaled linearly by 2;" in caplog.text
    plain = type(model).from_pretrained(folder, dtype=torch.float64).double()  # buffers too
    model = model.double()
    at = torch.arange(TOKENS.shape[1])[None]
    with tiny.KeepFloat64(), torch.no_grad():
        scaled = model(TOKENS, position_ids=2 * at).logits
        expected = plain(TOKENS, position_ids=at).logits
        unscaled = plain(TOKENS, position_ids=2 * at).logits
    assert (scaled - expected).abs().max() < 1e-12 < 1e-3 < (scaled - unscaled).abs().max()
    assert (model.max_seq_length, tokenizer.model_max_length) == (128, 128)
    assert model.config.max_position_embeddings == 128


def test_what_is_saved_is_scaled_too(tmp_path: Path) -> None:
    """The configuration of a merged model names transformers' own scaling, by a factor that is no integer too."""
    model, _ = load(tiny.folder(tmp_path / "base"), max_seq_length=96)
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    model.save_pretrained_merged(tmp_path / "merged")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 1.5)
    assert config.max_position_embeddings == 96


def test_layers_with_a_window_keep_their_angles(tmp_path: Path) -> None:
    model, _ = load(tiny.folder(tmp_path, "gemma3"), max_seq_length=256)
    rope = model.config.rope_parameters
    assert rope["full_attention"]["rope_type"] == "linear" and rope["full_attention"]["factor"] == 4
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_the_text_model_of_an_image_text_model_is_scaled(tmp_path: Path) -> None:
    model, _ = load(zoo.folder(tmp_path, "mistral3"), max_seq_length=128)
    assert model.model.language_model.rotary_emb.rope_type == "linear"
    assert model.config.text_config.max_position_embeddings == 128


def test_an_adapter_that_needs_a_scaled_model_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its tokenizer has the length; with that length it is the model that was trained."""
    model, tokenizer = load(tiny.folder(tmp_path / "base"), max_seq_length=128)
    model = FastLanguageModel.get_peft_model(model, r=2)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "adapter")
    caplog.clear()
    load(str(tmp_path / "adapter"))
    assert "max_seq_length: the adapter's texts had up to 128 tokens, and the model has 64 positions" in caplog.text
    caplog.clear()
    again, _ = load(str(tmp_path / "adapter"), max_seq_length=128)
    assert torch.equal(again.eval()(TOKENS).logits, model.eval()(TOKENS).logits)
    assert "the adapter's texts" not in caplog.text


def test_a_length_within_the_positions_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.folder(tmp_path)
    assert load(folder, max_seq_length=64)[0].config.to_dict() == load(folder)[0].config.to_dict()
    assert "RoPE" not in caplog.text


SCALED: dict[str, tuple[Any, str]] = {
    "llama3": (
        transformers.LlamaConfig(
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 2.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        r"got 128; allowed: 1 to 64 for this model, whose RoPE is scaled already \(llama3\)",
    ),
    "learned": (
        transformers.GPT2Config(n_positions=64),
        "got 128; allowed: 1 to 64 for this model, which has no RoPE to scale",
    ),
}


@pytest.mark.parametrize(("config", "message"), SCALED.values(), ids=SCALED)
def test_other_positions_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"max_seq_length: {message}"):
        positions.scale_positions(config, 128)
    positions.scale_positions(config, 64)


def test_the_trainer_cuts_at_the_length_that_the_model_was_loaded_for(tmp_path: Path) -> None:
    """TRL's default of 1024 does not replace it, whether RoPE is scaled or the length is the model's own."""
    folder = tiny.folder(tmp_path / "base", max_position_embeddings=2048)
    texts = Dataset.from_dict({"text": tiny.texts(4)})
    for asked, expected in ((4096, 4096), (2048, 2048), (None, 1024)):
        model, tokenizer = load(folder, max_seq_length=asked)
        trainer = UnslothTrainer(model, arguments(tmp_path), train_dataset=texts, processing_class=tokenizer)
        assert trainer.args.max_length == expected


@pytest.mark.parametrize(("kind", "logged"), [("dynamic", True), ("linear", False)])
def test_frequencies_by_the_longest_document_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, logged: bool
) -> None:
    caplog.set_level(logging.INFO)
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    model, texts = tiny.model(rope_parameters=rope), Dataset.from_dict({"text": tiny.texts(4)})
    for padding_free in (True, False):
        caplog.clear()
        args = arguments(tmp_path, padding_free=padding_free)
        UnslothTrainer(model, args, train_dataset=texts, processing_class=tiny.tokenizer())
        assert ("depend on the longest document of a batch" in caplog.text) == (logged and padding_free)

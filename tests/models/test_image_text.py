"""The text part of image-text models: loaded with its tokenizer, trained, its documents kept apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch.overrides import TorchFunctionMode
from trl import SFTConfig, SFTTrainer

from conformance.models.building import Subject, documents_of
from conformance.models.trial import ModelTrial
from tests import tiny
from tests.models import zoo
from tests.models.adapted import TOKENS, assert_near, load, logits_of, trained
from tests.trainer.runs import SGD, arguments
from unsloth_fast import FastModel, UnslothTrainer, backends
from unsloth_fast.data.facts import decide_batching
from unsloth_fast.models import loading, place
from unsloth_fast.models.interface import stacks_of

NAMES = ["gemma3", "mistral3", "qwen2_5_vl"]


@pytest.mark.parametrize("name", NAMES)
def test_the_model_and_its_tokenizer_are_loaded(tmp_path: Path, name: str) -> None:
    """The model's processor is not loaded; the logits of text are the folder's."""
    folder = zoo.folder(tmp_path / "base", name)
    model, tokenizer = load(folder)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    plain = type(model).from_pretrained(folder).eval()
    assert_near(logits_of(model.eval()), logits_of(plain))
    FastModel.for_inference(model)
    with torch.no_grad():
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(input_ids=TOKENS, **options), plain.generate(TOKENS, **options))


def test_the_template_of_the_processor_is_the_tokenizers(tmp_path: Path) -> None:
    folder = zoo.folder(tmp_path, "mistral3")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    _, tokenizer = load(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1"


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_computes_the_same(tmp_path: Path, name: str) -> None:
    model, tokenizer = load(zoo.folder(tmp_path / "base", name))
    model = trained(FastModel.get_peft_model(model, r=2, finetune_vision_layers=False))
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    plain = type(model.get_base_model()).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert_near(logits_of(plain), logits_of(model), 5e-3)  # saved in 16 bits


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_a_packed_row_are_apart(name: str) -> None:
    """The outer model of Gemma 3 makes masks of its own; positions of Qwen2.5-VL have three axes."""
    model, batch = zoo.model(name).eval(), tiny.packed([5, 7])
    with torch.no_grad():
        expected = torch.cat([model(document).logits for document in batch["input_ids"].split([5, 7], 1)], 1)
        place(model, backends.resolve("reference"))
        assert_near(model(**batch, use_cache=False).logits, expected)


class PairsOfTokens(TorchFunctionMode):
    """Keeps the names of the functions whose result has an entry for each pair of the tokens of a row."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.pairs, self.found = (tokens, tokens), set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-2:] == self.pairs:
            self.found.add(func.__name__)
        return result


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_unified", "phi4_multimodal", "git", "paligemma"])
def test_no_mask_of_all_pairs_is_made_without_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nor by an outer model, as in Gemma 3 and 4, nor where the layers stand beside towers in one model (Phi 4, GIT).

    The documents of a packed row have the logits that they have in padded rows of the untouched model.
    """
    subject = Subject.named(name)
    documents, model = documents_of(subject, "cpu", lengths=(13, 9, 1)), subject.model(torch.float32, "cpu").eval()
    padded, packed = documents.padded(), documents.packed()
    with torch.no_grad():
        expected = model(padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False).logits
        place(model, backends.resolve("reference"))
        with PairsOfTokens(23) as watched:
            logits = model(**{key: value for key, value in packed.items() if key != "labels"}, use_cache=False).logits
    assert_near(logits[0], expected[padded["attention_mask"].bool()])
    warned = [message for message in caplog.messages if "attends under a mask of 23 x 23" in message]
    assert bool(watched.found) == (len(warned) == 1) == (name in ("git", "paligemma"))


def test_a_mask_beside_the_bounds_is_refused() -> None:
    model, batch = zoo.model("gemma3"), tiny.packed([5, 7])
    place(model, backends.resolve("reference"))
    with pytest.raises(ValueError, match="attention_mask: got one together with cu_seq_lens_q"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_plain_trl(tmp_path: Path, name: str) -> None:
    """Two steps have TRL's losses; batches have no padding."""
    texts = Dataset.from_dict({"text": tiny.texts(4)})
    options = SGD | {"learning_rate": 0.1, "max_steps": 2}
    plain = SFTTrainer(
        zoo.model(name),
        arguments(tmp_path, SFTConfig, **options),
        train_dataset=texts,
        processing_class=tiny.tokenizer(),
    )
    own = UnslothTrainer(
        zoo.model(name), arguments(tmp_path, **options), train_dataset=texts, processing_class=tiny.tokenizer()
    )
    assert own.padding_free
    assert losses(own) == pytest.approx(losses(plain), rel=2e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_several_axes_need_the_bounds_of_documents(name: str, implementation: str, tmp_path: Path) -> None:
    """Under flex attention transformers looks for documents in the positions."""
    model = ModelTrial(Subject.named(name), "reference", torch.float32, "cpu").untouched()
    assert len(model.config.get_text_config().rope_parameters["mrope_section"]) == 3
    for stack in stacks_of(model):
        stack.config._attn_implementation = implementation
    plan = decide_batching(model, arguments(tmp_path, packing=True), {"processing_class": tiny.tokenizer()})
    assert plan.packing == (implementation != "flex_attention")
    assert plan.packing or "positions have several axes" in plan.reasons[0]


@pytest.mark.parametrize(
    "config",
    [transformers.WhisperConfig(), transformers.T5Config(), transformers.Qwen2AudioConfig(), transformers.CLIPConfig()],
    ids=lambda config: config.model_type,
)
def test_models_for_anything_but_text_are_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=f"model_name: got a model of type {config.model_type!r}; allowed: causal"):
        loading.model_class(config)

"""Code written for Unsloth, and for older releases of TRL, runs unchanged."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import OPTConfig, OPTForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import unsloth_fast
from tests import tiny
from tests.trainer.runs import arguments
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments, compat

pytestmark = pytest.mark.filterwarnings("ignore")


def losses(trainer: Any) -> list[float]:
    """The losses that were logged."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """A model, its data and its arguments, for any trainer."""
    made: dict[str, Any] = {
        "model": tiny.model(),
        "args": arguments(folder, SFTConfig, max_steps=2),
        "train_dataset": Dataset.from_dict({"words": tiny.texts(6)}),
        "processing_class": tiny.tokenizer(),
        "dataset_text_field": "words",
    }
    return made | more


def test_patching_is_idempotent_and_can_be_undone(tmp_path: Path) -> None:
    """The signature of the class does not change."""
    own, signature = SFTTrainer.__init__, inspect.signature(SFTTrainer)
    compat.patch_trl()
    patched = SFTTrainer.__init__
    compat.patch_trl()
    assert SFTTrainer.__init__ is patched is not own
    assert inspect.signature(SFTTrainer) == signature
    assert type(SFTTrainer(**options(tmp_path))) is UnslothTrainer
    compat.unpatch_trl()
    compat.unpatch_trl()
    assert SFTTrainer.__init__ is own
    with pytest.raises(TypeError, match="dataset_text_field"):
        SFTTrainer(**options(tmp_path))


def test_a_class_derived_from_trls_behaves_as_before(tmp_path: Path) -> None:
    """It also accepts the older call styles."""

    class Mine(SFTTrainer):
        pass

    compat.patch_trl()
    given = options(tmp_path, max_seq_length=17)
    tokenizer = given.pop("processing_class")
    trainer = Mine(
        given.pop("model"), given.pop("args"), None, given.pop("train_dataset"), tokenizer=tokenizer, **given
    )
    assert type(trainer) is Mine and trainer.args.max_length == 17
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(TypeError, match="max_sequence_length"):
        Mine(**options(tmp_path, max_sequence_length=17))


def test_a_class_derived_from_trls_checkpoints_as_trl_does(tmp_path: Path) -> None:
    """It is called in an older style, with our arguments, which do not mention checkpointing."""

    class Mine(SFTTrainer):
        pass

    compat.patch_trl()
    given = options(tmp_path, max_seq_length=17)
    given["args"] = UnslothTrainingArguments(str(tmp_path), use_cpu=True, bf16=False)
    assert Mine(**given).args.gradient_checkpointing is True
    assert Mine(**given | {"model": tiny.model(), "gradient_checkpointing": False}).args.gradient_checkpointing is False


def test_any_call_style_gives_the_same_run(tmp_path: Path) -> None:
    """Names are current or older, and given as keywords of the trainer or in the arguments, which do not change."""
    data = Dataset.from_dict({"words": tiny.texts(18)})
    new = arguments(tmp_path, max_steps=3, dataset_text_field="words", max_length=24, packing=True)
    old = arguments(tmp_path, max_steps=3)
    trainers = [
        UnslothTrainer(tiny.model(), new, None, data, processing_class=tiny.tokenizer()),
        UnslothTrainer(
            model=tiny.model(),
            args=old,
            train_dataset=data,
            tokenizer=tiny.tokenizer(),
            dataset_text_field="words",
            max_seq_length=24,
            packing=True,
        ),
    ]
    for trainer in trainers:
        trainer.train()
    assert len(losses(trainers[0])) == 3
    assert losses(trainers[0]) == losses(trainers[1])
    assert (old.packing, old.max_length, old.padding_free) == (False, 1024, None)


def test_an_unknown_keyword_is_refused(tmp_path: Path) -> None:
    """It is not ignored."""
    with pytest.raises(TypeError, match="max_sequence_length"):
        UnslothTrainer(**options(tmp_path, max_sequence_length=17))


@pytest.mark.parametrize(
    ("model_length", "given", "taken"),
    [
        (48, {}, 48),  # TRL's default is 1024
        (48, {"max_length": 24}, 24),
        (48, {"max_length": 60}, 48),
        (48, {"max_length": None}, 48),
        (64, {}, 1024),  # the model's number of positions: not a choice of the user
        (None, {}, 1024),
    ],
)
def test_the_length_that_the_model_was_loaded_with(
    tmp_path: Path, model_length: int | None, given: dict[str, Any], taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It replaces the arguments' default and limits every other value."""
    model = tiny.model()
    if model_length:
        model.max_seq_length = model_length
    args = arguments(tmp_path, SFTConfig, dataset_text_field="words", **given)
    trainer = UnslothTrainer(**options(tmp_path, model=model, args=args))
    assert trainer.args.max_length == taken
    assert ("the max_seq_length of the model" in caplog.text) == (taken != given.get("max_length", 1024))


def test_the_models_backend_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used for a trainer whose arguments name no backend."""
    monkeypatch.delenv("UNSLOTH_BACKEND", raising=False)
    model = tiny.model()
    model.unsloth_backend = "reference,rope=reference"
    assert UnslothTrainer(**options(tmp_path, model=model)).backend.name == "reference,rope=reference"
    args = arguments(tmp_path, backend="reference")
    assert UnslothTrainer(**options(tmp_path, model=model, args=args)).backend.name == "reference"


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments], ids=lambda kind: kind.__name__)
def test_arguments_accept_older_names_while_trl_is_patched(tmp_path: Path, kind: type) -> None:
    old = {"warmup_ratio": 0.1, "evaluation_strategy": "steps", "eval_steps": 2, "save_safetensors": True}
    with pytest.raises(TypeError, match="unexpected keyword"):
        arguments(tmp_path, kind, **old)
    compat.patch_trl()
    signature = inspect.signature(kind)
    args = arguments(tmp_path, kind, **old, group_by_length=True)
    assert (args.warmup_steps, args.eval_strategy, args.train_sampling_strategy) == (0.1, "steps", "group_by_length")
    with pytest.raises(TypeError, match="never_a_name"):
        arguments(tmp_path, kind, never_a_name=1)
    compat.unpatch_trl()
    assert inspect.signature(kind) == signature
    with pytest.raises(TypeError, match="unexpected keyword"):
        arguments(tmp_path, kind, **old)


def test_the_import_of_a_loader_patches_trl_once(tmp_path: Path) -> None:
    """Arguments may be made before a model is loaded, and `unpatch_trl` holds though the loader is used again."""
    unsloth_fast._patch_trl_once.cache_clear()
    exec("from unsloth_fast import UnslothTrainer, is_bfloat16_supported")
    assert not compat.is_patched()
    exec("from unsloth_fast import FastLanguageModel")
    for kind in (SFTConfig, TrainingArguments):
        args = arguments(tmp_path, kind, warmup_ratio=0.1, evaluation_strategy="steps", eval_steps=2)
        assert (args.warmup_steps, args.eval_strategy) == (0.1, "steps")
    compat.unpatch_trl()
    exec("from unsloth_fast.models import FastModel")
    assert not compat.is_patched()


@pytest.mark.parametrize(
    "given",
    [
        {"max_length": 16},
        {"max_length": None},
        {"max_length": None, "data_collator": DataCollatorForLanguageModeling(0)},
        {"max_length": 16, "packing": True},
    ],
    ids=str,
)
def test_padding_free_batches_of_a_script_for_trl(tmp_path: Path, given: dict[str, Any]) -> None:
    """They are refused in TRL's words, where the installed release refuses them."""
    given = dict(given)
    more = {"data_collator": given.pop("data_collator", None), "processing_class": tiny.tokenizer()}
    data = Dataset.from_dict({"text": tiny.texts(6)})

    def outcome() -> Any:
        args = arguments(tmp_path, SFTConfig, padding_free=True, **given)
        try:
            return SFTTrainer(model=tiny.model(), args=args, train_dataset=data, **more)
        except ValueError as error:
            return str(error)

    plain = outcome()
    compat.patch_trl()
    patched = outcome()
    if isinstance(plain, str):
        assert patched == plain
    else:
        assert type(patched) is UnslothTrainer and patched.padding_free and patched.args.padding_free


def test_padding_free_batches_of_a_script_for_unsloth(tmp_path: Path) -> None:
    """The documents are cut to the length that the model was loaded with, or that the trainer was called with."""
    compat.patch_trl()
    loaded, data = tiny.model(), Dataset.from_dict({"text": [" ".join(["w4"] * 20)]})
    loaded.max_seq_length = 16
    for model, more in ((loaded, {}), (tiny.model(), {"max_seq_length": 16})):
        args = arguments(tmp_path, SFTConfig, padding_free=True)
        trainer: Any = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tiny.tokenizer(), **more)
        assert trainer.padding_free and [len(row["input_ids"]) for row in trainer.train_dataset] == [16]


def test_documents_that_a_model_would_mix_are_padded_in_a_script_for_trl(tmp_path: Path) -> None:
    compat.patch_trl()
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(vocab_size=48, word_embed_proj_dim=16, **sizes))
    args = arguments(tmp_path, SFTConfig, padding_free=True, max_length=None)
    data = Dataset.from_dict({"text": tiny.texts(6)})
    trainer: Any = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tiny.tokenizer())
    assert not trainer.padding_free and not trainer.data_collator.padding_free


def test_a_script_of_years_ago_trains(tmp_path: Path) -> None:
    """Its arguments are transformers' under older names; TRL's fields and the tokenizer are the trainer's keywords."""
    compat.patch_trl()
    trainer = SFTTrainer(
        model=tiny.model(),
        tokenizer=tiny.tokenizer(),
        train_dataset=Dataset.from_dict({"words": tiny.texts(6)}),
        dataset_text_field="words",
        max_seq_length=12,
        dataset_num_proc=1,
        packing=False,
        args=arguments(
            tmp_path, TrainingArguments, max_steps=2, warmup_ratio=0.5, optim="adamw_torch", lr_scheduler_type="linear"
        ),
    )
    trainer.train()
    assert trainer.args.max_length == 12 and trainer.args.warmup_steps == 0.5
    assert [log["learning_rate"] for log in trainer.state.log_history if "loss" in log] == [0.0, 1e-3]

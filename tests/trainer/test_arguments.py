"""Arguments of every release of TRL, resolved once: what was asked for, what holds, and no input changes."""

from pathlib import Path
from typing import Any, cast

import pytest
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import SFTConfig

from tests import tiny
from tests.trainer.runs import arguments
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments
from unsloth_fast.arguments import ResolvedArguments, check_device, resolve_arguments
from unsloth_fast.arguments.sft_config import as_sft_config, rename_arguments
from unsloth_fast.data.preparation import Preparation

PARAMETERS = ("data_collator", "train_dataset", "eval_dataset", "processing_class", "callbacks")
TRL_MAX_LENGTH = 1024  # TRL's default


def documents() -> Dataset:
    """Two documents of tokens."""
    return Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7]]})


def resolve(args: Any = None, model: Any = None, positional: tuple[Any, ...] = (), **keywords: Any) -> Any:
    """The resolved arguments of a trainer on two documents."""
    given = {"processing_class": tiny.tokenizer()} | ({} if len(positional) > 1 else {"train_dataset": documents()})
    return resolve_arguments(model or tiny.model(), args, positional, given | keywords)


def loaded_model(**attributes: Any) -> Any:
    """A model with the attributes that `FastLanguageModel` gives to the models that it loads."""
    model = tiny.model()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    "kind", [UnslothTrainingArguments, SFTConfig, TrainingArguments], ids=lambda kind: kind.__name__
)
def test_nothing_that_is_given_changes(tmp_path: Path, kind: type) -> None:
    """The user's arguments, with accelerate's configuration in them, keywords, data and model do not change."""
    args = arguments(tmp_path, kind, accelerator_config={"dispatch_batches": True})
    model = loaded_model(max_seq_length=16, unsloth_gradient_checkpointing=True, unsloth_backend="reference")
    keywords = {"train_dataset": documents(), "tokenizer": tiny.tokenizer(), "packing": True, "max_seq_length": 12}
    given = [vars(args), vars(args.accelerator_config), keywords, vars(model), model.config.to_dict()]
    before = [dict(values) for values in given]
    resolved = resolve_arguments(model, args, (), keywords)
    given[-1] = model.config.to_dict()
    for values, old in zip(given, before, strict=True):
        assert values.keys() == old.keys()
        assert all(values[name] is old[name] or values[name] == old[name] for name in old)
    assert keywords["train_dataset"].to_list() == documents().to_list()
    assert resolved.args is not args and resolved.args.accelerator_config is not args.accelerator_config
    assert (resolved.args.max_length, resolved.args.packing) == (12, True)
    assert resolved.args.accelerator_config.dispatch_batches is False


def test_older_names_and_positions_reach_trls_keywords(tmp_path: Path) -> None:
    """TRL's parameters after `args` may be positional; older keywords and fields of the arguments may be keywords."""
    collator, data, tokenizer = object(), documents(), tiny.tokenizer()
    resolved = resolve_arguments(
        tiny.model(),
        arguments(tmp_path),
        (collator, data),
        {"tokenizer": tokenizer, "max_seq_length": 9, "dataset_text_field": "words", "callbacks": []},
    )
    expected = {"data_collator": collator, "train_dataset": data, "processing_class": tokenizer, "callbacks": []}
    assert resolved.keywords == expected
    assert (resolved.args.max_length, resolved.args.dataset_text_field) == (9, "words")


def test_an_argument_by_position_and_by_keyword_is_refused(tmp_path: Path) -> None:
    """Python refuses it too: neither of the two may win silently."""
    with pytest.raises(TypeError, match=r"^train_dataset: got a value by position and one by keyword; allowed"):
        resolve(arguments(tmp_path), positional=(None, documents()), train_dataset=documents())


def test_too_many_positional_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^positional arguments: got 102; allowed: up to"):
        resolve_arguments(tiny.model(), arguments(tmp_path), (None,) * 100, {})


def test_an_unknown_keyword_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^max_lenght: got an unknown keyword; allowed"):
        resolve(arguments(tmp_path), max_lenght=9)


def test_one_field_under_two_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^max_seq_length: got 9, and max_length=8; allowed: one of the two"):
        resolve(arguments(tmp_path), max_seq_length=9, max_length=8)


# A backend by its exceptions, so that each source has a name of its own.
KEYWORD, FIELD, MODEL, VARIABLE = (f"reference,{name}=reference" for name in ("rope", "swiglu", "geglu", "rms_norm"))


@pytest.mark.parametrize(
    ("keyword", "field", "models", "expected"),
    [
        (KEYWORD, FIELD, MODEL, KEYWORD),
        (KEYWORD, None, None, KEYWORD),
        (None, FIELD, MODEL, FIELD),
        (None, None, MODEL, MODEL),
        (None, None, None, VARIABLE),
    ],
)
def test_the_first_backend_that_is_named_is_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keyword: str | None,
    field: str | None,
    models: str | None,
    expected: str,
) -> None:
    """The order is the trainer's keyword, the arguments' field, the model's backend, and UNSLOTH_BACKEND."""
    monkeypatch.setenv("UNSLOTH_BACKEND", VARIABLE)
    keywords = {} if keyword is None else {"backend": keyword}
    model = loaded_model(**{} if models is None else {"unsloth_backend": models})
    assert resolve(arguments(tmp_path, backend=field), model, **keywords).backend.name == expected


def test_a_plain_sft_config_takes_the_backend_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a configuration has no field for one."""
    monkeypatch.setenv("UNSLOTH_BACKEND", VARIABLE)
    args = arguments(tmp_path, SFTConfig)
    assert resolve(args, loaded_model(unsloth_backend=MODEL)).backend.name == MODEL
    assert resolve(args).backend.name == VARIABLE


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_takes_its_backend_among_the_keywords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keywords win over UNSLOTH_BACKEND."""
    monkeypatch.setenv("UNSLOTH_BACKEND", "fast")
    options = {"train_dataset": documents(), "processing_class": tiny.tokenizer(), "backend": KEYWORD}
    trainer = UnslothTrainer(tiny.model(), arguments(tmp_path, backend=None), **options)
    assert trainer.backend.name == KEYWORD


def test_an_unknown_backend_among_the_keywords_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^backend: got 'quick'; allowed: 'auto', 'fast', 'reference'"):
        resolve(arguments(tmp_path), backend="quick")


@pytest.mark.parametrize(
    ("field", "keyword", "models", "expected", "warned"),
    [
        (TRL_MAX_LENGTH, None, None, TRL_MAX_LENGTH, False),
        (9, None, None, 9, False),
        (None, None, None, None, False),
        (9, 7, None, 7, False),
        (TRL_MAX_LENGTH, None, 16, 16, True),
        (TRL_MAX_LENGTH, None, 2048, 2048, True),
        (TRL_MAX_LENGTH, TRL_MAX_LENGTH, 2048, TRL_MAX_LENGTH, False),
        (TRL_MAX_LENGTH, TRL_MAX_LENGTH, 16, 16, True),
        (9, None, 16, 9, False),
        (16, None, 16, 16, False),
        (17, None, 16, 16, True),
        (None, None, 16, 16, True),
        (TRL_MAX_LENGTH, None, 64, TRL_MAX_LENGTH, False),
        (None, None, 64, None, False),
    ],
)
def test_max_length_is_at_most_the_models_max_seq_length(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    field: int | None,
    keyword: int | None,
    models: int | None,
    expected: int | None,
    warned: bool,
) -> None:
    """A default becomes the model's; 64 is the number of the model's positions, which counts as no max_seq_length."""
    model = loaded_model(**{} if models is None else {"max_seq_length": models})
    keywords = {} if keyword is None else {"max_length": keyword}
    assert resolve(arguments(tmp_path, max_length=field), model, **keywords).args.max_length == expected
    replaced = [record.message for record in caplog.records if record.message.startswith("max_length:")]
    value = field if keyword is None else keyword
    assert replaced == [f"max_length: {expected}, the max_seq_length of the model, replaces {value}"] * warned


@pytest.mark.parametrize("length", [0, -3])
def test_a_max_length_below_one_is_refused(tmp_path: Path, length: int) -> None:
    for options in ({}, {"packing": True}):
        with pytest.raises(ValueError, match=rf"^max_length: got {length}; allowed"):
            resolve(arguments(tmp_path, max_length=length, **options))


@pytest.mark.parametrize(
    ("kind", "field", "keyword", "models", "expected"),
    [
        (UnslothTrainingArguments, None, None, None, True),
        (UnslothTrainingArguments, None, None, False, False),
        (UnslothTrainingArguments, None, None, "unsloth", True),
        (UnslothTrainingArguments, None, False, True, False),
        (UnslothTrainingArguments, True, None, False, True),
        (UnslothTrainingArguments, False, None, True, False),
        (UnslothTrainingArguments, True, False, True, False),
        (SFTConfig, True, None, None, True),
        (SFTConfig, True, None, False, False),
        (SFTConfig, True, True, False, True),
        (SFTConfig, False, None, True, False),
        (TrainingArguments, False, None, None, False),
        (TrainingArguments, False, None, True, True),
        (TrainingArguments, False, False, True, False),
        (TrainingArguments, True, None, False, True),
    ],
)
def test_gradient_checkpointing_is_the_keywords_the_arguments_or_the_models(
    tmp_path: Path, kind: type, field: bool | None, keyword: bool | None, models: Any, expected: bool
) -> None:
    """This is their order. A class's default, True in SFTConfig, False in TrainingArguments, counts as no choice."""
    model = loaded_model(**{} if models is None else {"unsloth_gradient_checkpointing": models})
    keywords = {} if keyword is None else {"gradient_checkpointing": keyword}
    args = arguments(tmp_path, kind, gradient_checkpointing=field)
    settings, rest, updates = rename_arguments(model, args, keywords, PARAMETERS)
    assert settings.gradient_checkpointing is expected
    assert getattr(settings, "activation_checkpointing", expected) is expected
    assert (rest, updates) == ({}, keywords)


@pytest.mark.skipif(not hasattr(TrainingArguments, "activation_checkpointing"), reason="a newer name of transformers")
def test_gradient_checkpointing_has_a_second_name(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_checkpointing=True)
    settings, _, _ = rename_arguments(tiny.model(), args, {"activation_checkpointing": False}, PARAMETERS)
    assert settings.gradient_checkpointing is settings.activation_checkpointing is False


@pytest.mark.parametrize(
    ("options", "streamed", "expected"),
    [
        ({"padding_free": True}, False, False),
        ({"packing": True}, False, False),
        ({"padding_free": False}, False, None),
        ({"padding_free": False}, True, False),
        ({"padding_free": False, "accelerator_config": {"dispatch_batches": True}}, False, True),
    ],
)
def test_each_process_reads_its_own_rows_where_batches_cannot_be_split(
    tmp_path: Path, options: dict[str, Any], streamed: bool, expected: bool | None
) -> None:
    """Padding-free batches are one row, and those of a stream are padded to different lengths."""
    rows: Any = IterableDataset.from_generator(lambda: iter(documents().to_list())) if streamed else documents()
    resolved = resolve(arguments(tmp_path, **options), train_dataset=rows)
    assert resolved.args.accelerator_config.dispatch_batches is expected


def test_dispatching_that_has_no_effect_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolve(arguments(tmp_path, accelerator_config={"dispatch_batches": True}))
    assert "dispatch_batches=True has no effect: each process reads its own rows" in caplog.text


@pytest.mark.parametrize(
    ("options", "packing", "padding_free"),
    [
        ({}, False, True),
        ({"packing": True}, True, True),
        ({"padding_free": False}, False, False),
        ({"packing": True, "padding_free": False}, False, False),
    ],
)
def test_trl_is_not_asked_for_padding_free_batches(
    tmp_path: Path, options: dict[str, Any], packing: bool, padding_free: bool
) -> None:
    """TRL would refuse them with a max_length; the trainer's own collator makes them."""
    resolved = resolve(arguments(tmp_path, **options))
    assert (resolved.batching.packing, resolved.batching.padding_free) == (packing, padding_free)
    assert (resolved.args.packing, resolved.args.padding_free) == (packing, False)


@pytest.mark.parametrize(
    ("options", "level"), [({}, "INFO"), ({"packing": True}, "WARNING"), ({"padding_free": True}, "WARNING")]
)
def test_a_refused_request_is_logged_as_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], level: str
) -> None:
    """The warning has the reason; without a request the line is information."""
    caplog.set_level("INFO", "unsloth_fast")
    resolve(arguments(tmp_path, **options), data_collator=lambda examples: {})
    (record,) = [record for record in caplog.records if record.message.startswith("batching:")]
    assert record.levelname == level
    assert record.message.startswith("batching: packing off, padding-free off, because a data collator was ")


def test_the_vocabulary_and_the_trained_tokens_are_resolved(tmp_path: Path) -> None:
    """The preparation needs them. A collator may change the tokens, so then the vocabulary counts as unknown."""
    model, by_trl = tiny.model(), cast(Any, print)
    found: ResolvedArguments = resolve(arguments(tmp_path), model)
    assert (found.vocabulary, found.completion_only, found.own_collator) == (len(tiny.WORDS), False, False)
    assert found.preparation()(by_trl) == Preparation(by_trl, found.backend.training, len(tiny.WORDS), False, False)
    assert found.config is model.config
    collated = resolve(arguments(tmp_path), data_collator=lambda examples: {})
    assert collated.vocabulary is None and collated.own_collator
    pairs = Dataset.from_dict({"prompt": ["w1"], "completion": ["w2"]})
    assert resolve(arguments(tmp_path), train_dataset=pairs).completion_only


def test_a_data_set_that_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train_dataset: got no row; allowed: at least one"):
        resolve(arguments(tmp_path), train_dataset=documents().select([]))


def test_an_sft_config_is_copied(tmp_path: Path) -> None:
    args = arguments(tmp_path, SFTConfig, learning_rate=0.5)
    copied = as_sft_config(args, tiny.model())
    assert type(copied) is SFTConfig and copied is not args
    assert vars(copied) == vars(args)


def test_training_arguments_become_ours_with_their_values(tmp_path: Path) -> None:
    """They include the token for the hub, which `to_dict` hides."""
    args = arguments(tmp_path, TrainingArguments, learning_rate=0.5, hub_token="secret")
    made = as_sft_config(args, tiny.model())
    assert type(made) is UnslothTrainingArguments
    assert (made.learning_rate, made.hub_token, made.output_dir) == (0.5, "secret", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder"), [("a/model", "model-SFT"), ("model", "model-SFT"), ("a/model/", "model-SFT"), ("", "-SFT")]
)
def test_without_arguments_the_output_folder_is_named_after_the_model(
    monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    """The model may be given as such or by name; TRL does the same."""
    for module in ("transformers.training_args", "unsloth_fast.config"):  # TRL's default is bfloat16
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: True)
    model = tiny.model()
    model.config._name_or_path = name
    for given in (model, name):
        made = as_sft_config(None, given)
        assert type(made) is UnslothTrainingArguments and made.output_dir == folder


def test_arguments_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^args: got dict; allowed: UnslothTrainingArguments, trl.SFTConfig or"):
        as_sft_config({"output_dir": str(tmp_path)}, tiny.model())  # type: ignore[arg-type]


def test_activation_offloading_on_a_cpu_is_refused(tmp_path: Path) -> None:
    """There is no GPU memory to free."""
    args = arguments(tmp_path, activation_offloading=True)
    with pytest.raises(ValueError, match=r"^activation_offloading: got True on a CPU; allowed: False"):
        resolve(args)
    with pytest.raises(ValueError, match=r"^activation_offloading: got True on a CPU; allowed: False"):
        check_device(args)
    check_device(arguments(tmp_path))

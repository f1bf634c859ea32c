"""Keywords of older releases of TRL: renamed where the old name is unknown, and split between trainer and config."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from unsloth_fast.keywords import CONVERTED, RENAMED, WITHOUT_EFFECT, current_names, split_keywords

TODAY = (
    ["model", "args", "processing_class"],
    ["packing", "dataset_text_field", *(name for name in RENAMED.values() if name != "processing_class")],
)
TRAINER = ("model", "args", "train_dataset", "processing_class", "tokenizer")
CONFIG = ("packing", "max_length", "max_seq_length", "dataset_text_field")


def some(names: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), unique=True, max_size=len(names))


# Trainers and configs of any age, and mostly known keywords, with the values 0 and 1.
any_call: Callable[..., Any] = given(
    trainer=st.one_of(st.just(list(TRAINER[:-1])), some(TRAINER)),
    config=st.one_of(st.just(["packing", "max_length", "dataset_text_field"]), some(CONFIG)),
    keywords=st.dictionaries(st.sampled_from((*TRAINER, *CONFIG, "packin")), st.integers(0, 1), max_size=5),
)
often = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def current_name(name: str, known: set[str]) -> str:
    return name if name in known else RENAMED.get(name, name)


@often
@any_call
def test_every_keyword_arrives_or_an_error_names_it(
    trainer: list[str], config: list[str], keywords: dict[str, int]
) -> None:
    known = {*trainer, *config}
    names = [current_name(name, known) for name in keywords]
    values: dict[str, set[int]] = {name: set() for name in names}
    for name, value in zip(names, keywords.values(), strict=True):
        values[name].add(value)
    unknown = [name for name in names if name not in known]
    if unknown or any(len(found) > 1 for found in values.values()):
        with pytest.raises((TypeError, ValueError)) as raised:
            split_keywords(trainer, set(config), keywords)
        assert any(name in str(raised.value) for name in keywords)
        return
    of_trainer, of_config = split_keywords(trainer, set(config), keywords)
    assert of_trainer.keys() <= set(trainer) and of_config.keys() <= set(config)
    assert {**of_config, **of_trainer} == {name: found.pop() for name, found in values.items()}


@often
@any_call
def test_splitting_twice_changes_nothing(trainer: list[str], config: list[str], keywords: dict[str, int]) -> None:
    try:
        of_trainer, of_config = split_keywords(trainer, config, keywords)
    except (TypeError, ValueError):
        return
    assert split_keywords(trainer, config, {**of_trainer, **of_config}) == (of_trainer, of_config)


@often
@any_call
def test_a_name_of_both_belongs_to_the_trainer(trainer: list[str], config: list[str], keywords: dict[str, int]) -> None:
    config = [*config, *trainer]
    try:
        of_trainer, of_config = split_keywords(trainer, config, keywords)
    except (TypeError, ValueError):
        return
    assert not of_config.keys() & set(trainer) and of_trainer.keys() <= set(trainer)


@often
@any_call
def test_arguments_are_not_modified(trainer: list[str], config: list[str], keywords: dict[str, int]) -> None:
    before = list(trainer), list(config), list(keywords.items())
    with suppress(TypeError, ValueError):
        split_keywords(trainer, config, keywords)
    assert (trainer, config, list(keywords.items())) == before


def test_old_names_become_those_of_today() -> None:
    """The call is in the oldest style."""
    tokenizer = object()
    keywords = {"tokenizer": tokenizer, "max_seq_length": 512, "packing": True, "dataset_text_field": "text", "args": 1}
    trainer, config = split_keywords(*TODAY, keywords)
    assert trainer == {"processing_class": tokenizer, "args": 1}
    assert config == {"max_length": 512, "packing": True, "dataset_text_field": "text"}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
@pytest.mark.parametrize("place", [0, 1], ids=["trainer", "config"])
def test_an_old_name_is_renamed_only_if_it_is_unknown(old: str, new: str, place: int) -> None:
    """An older trainer takes the tokenizer itself, and an older config the old length."""
    names: list[list[str]] = [[], []]
    for known, arrives in (([new], new), ([old], old), ([old, new], old)):
        names[place] = known
        assert split_keywords(*names, {old: 1})[place] == {arrives: 1}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_one_value_under_both_names_is_no_conflict(old: str, new: str) -> None:
    trainer, config = split_keywords(*TODAY, {old: "value", new: "value"})
    assert {**trainer, **config} == {new: "value"}


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"max_lenght": 5}, TypeError, "^max_lenght: got an unknown keyword"),
        ({"tokenizer": 1, "processing_class": 2}, ValueError, "^tokenizer: got 1, and processing_class=2"),
        ({"processing_class": 2, "tokenizer": 1}, ValueError, "^tokenizer: got 1, and processing_class=2"),
        ({"max_seq_length": 2, "max_length": 1}, ValueError, "^max_seq_length: got 2, and max_length=1"),
        ({"max_length": 1, "max_seq_length": 2}, ValueError, "^max_seq_length: got 2, and max_length=1"),
    ],
)
def test_ambiguous_and_unknown_keywords_are_named(
    keywords: dict[str, int], error: type[Exception], message: str
) -> None:
    """No keyword is dropped silently."""
    with pytest.raises(error, match=message):
        split_keywords(*TODAY, keywords)


def test_the_installed_trl_accepts_the_result() -> None:
    """The names are those of the installed trainer and config."""
    parameters = inspect.signature(SFTTrainer).parameters
    fields = [name for name in SFTConfig.__dataclass_fields__ if name not in TrainingArguments.__dataclass_fields__]
    trainer, config = split_keywords(parameters, fields, {"tokenizer": 1, "max_seq_length": 2, "packing": True})
    assert trainer == {"processing_class": 1}
    assert config == {"max_length": 2, "packing": True}


TRAINING = {"warmup_steps", "optim", "train_sampling_strategy", "include_for_metrics", "eval_strategy"}


@pytest.mark.parametrize(
    ("given", "today"),
    [
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0}, {"warmup_steps": 0.0}),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, {"warmup_steps": 5}),  # steps win, as they always did
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, {"warmup_steps": 5}),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.1}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False, "adafactor": False}, {}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
        ({"evaluation_strategy": None, "q_galore_config": None}, {}),
        ({"overwrite_output_dir": True, "save_safetensors": True, "dataset_batch_size": None}, {}),
        ({"never_a_name": 1}, {"never_a_name": 1}),
    ],
)
def test_values_of_older_names(given: dict[str, Any], today: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A value that asks for something has its meaning, and one that asks for nothing is left out."""
    assert current_names(TRAINING, given) == today
    assert ("overrides" in caplog.text) == ({"warmup_ratio", "warmup_steps"} <= given.keys())


def test_a_known_name_is_not_converted() -> None:
    assert (
        current_names({"warmup_ratio", "group_by_length"}, given := {"warmup_ratio": 7, "group_by_length": 1}) == given
    )


def test_a_removed_name_that_asks_for_something_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert current_names(TRAINING, {"save_safetensors": False}) == {}
    assert "save_safetensors: got False, which has no effect" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("warmup_ratio", 1.5), ("warmup_ratio", "a lot"), ("q_galore_config", 1)])
def test_an_older_value_without_a_counterpart_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got {value!r}; allowed: "):
        current_names(TRAINING, {name: value})


def test_every_older_name_leads_to_a_field_of_the_installed_release() -> None:
    names = {*(entry.name for entry in fields(SFTConfig)), *inspect.signature(SFTTrainer).parameters}
    assert names >= {name for name in RENAMED.values()} | TRAINING
    assert not names & {*WITHOUT_EFFECT, *CONVERTED}

"""Which columns are trained on, and what counts as a named dataset_text_field."""

import copy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig

from tests import tiny
from tests.data.samples import stream
from tests.trainer.runs import arguments
from unsloth_fast import UnslothTrainingArguments
from unsloth_fast.arguments import resolve_arguments
from unsloth_fast.data.choice import names_text_field, trained_columns
from unsloth_fast.data.reading import read_columns

CHAT = [{"role": "user", "content": "w1"}]
PAIR = {"prompt": "w1", "completion": "w2"}


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"input_ids": [3], "text": "w1", "messages": CHAT}, {}, "input_ids"),
        ({"text": "w1", "messages": CHAT, "conversations": CHAT}, {}, "text"),
        ({"text": "w1", "prompt": "w2"}, {}, "text"),
        ({"text": "w1"} | PAIR, {}, "prompt completion"),
        ({"text": "w1"} | PAIR, {"named": True}, "text"),
        ({"text": "w1"} | PAIR, {"named": True, "completion_only_loss": True}, "prompt completion"),
        ({"text": "w1", "messages": CHAT}, {"assistant_only_loss": True, "named": True}, "messages"),
        ({"text": "w1"}, {"assistant_only_loss": True}, "text"),
        ({"text": None, "messages": CHAT}, {}, "messages"),
        ({"text": "w1", "messages": None}, {}, "text"),
        ({"messages": None, "conversations": CHAT}, {}, "conversations"),
        ({"body": "w1", "text": "w2", "messages": CHAT}, {"dataset_text_field": "body", "named": True}, "body"),
        ({"messages": CHAT}, {"dataset_text_field": "body", "named": True}, "messages"),
        ({"messages": CHAT} | PAIR, {}, "prompt completion"),
        ({"messages": None}, {}, "messages"),
        ({"other": "w1"}, {}, ""),
    ],
)
def test_columns(row: dict[str, Any], options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    named = options.pop("named", False)
    args = arguments(tmp_path, SFTConfig, **options)
    for data in (Dataset.from_list([row]), stream(Dataset.from_list([row]))):
        assert trained_columns(data, row, args, named=named) == tuple(expected.split())


def test_a_field_that_was_named(tmp_path: Path) -> None:
    """TRL's own configuration does not tell "text" from its default."""
    for kind, options, named in [
        (UnslothTrainingArguments, {}, False),
        (UnslothTrainingArguments, {"dataset_text_field": "text"}, True),
        (UnslothTrainingArguments, {"dataset_text_field": "body"}, True),
        (SFTConfig, {}, False),
        (SFTConfig, {"dataset_text_field": "text"}, False),
        (SFTConfig, {"dataset_text_field": "body"}, True),
    ]:
        args = copy.copy(arguments(tmp_path, kind, **options))
        assert args.dataset_text_field == options.get("dataset_text_field", "text")
        assert names_text_field(args, {}) is named
        assert names_text_field(args, {"dataset_text_field": "text"})


@pytest.mark.parametrize("kind", [UnslothTrainingArguments, SFTConfig, TrainingArguments, None])
def test_another_keyword_of_the_trainer_does_not_name_the_field(tmp_path: Path, kind: type | None) -> None:
    """It lets the trainer make new arguments, in which the field has its value."""
    data = {"train_dataset": Dataset.from_list([{"text": "w1"} | PAIR]), "processing_class": tiny.tokenizer()}
    args, keywords = (arguments(tmp_path, kind), {}) if kind else (None, {"use_cpu": True, "bf16": False})
    for named in ({}, {"dataset_text_field": "text"}):
        found = resolve_arguments(tiny.model(), args, (), data | keywords | {"seed": 7} | named)
        assert found.names_text_field is bool(named)
        assert found.completion_only is not bool(named)


def test_a_named_field_that_is_absent(caplog: pytest.LogCaptureFixture) -> None:
    read_columns(Dataset.from_list([{"messages": CHAT}]), "train", ("messages",), "body", named=True)
    assert "train: got no column 'body', the dataset_text_field; trained on 'messages'" in caplog.text

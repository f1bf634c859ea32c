"""What cannot be trained on, and what is cut off or counts for nothing, is said before the first step."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from trl import SFTConfig

from tests import tiny
from tests.data.test_batches import make, pad, stream, tokens
from tests.trainer.runs import LOSES_LABELS
from unsloth_fast.data import labels
from unsloth_fast.data.truncation import Truncation
from unsloth_fast.optimizer import check_trainable

pytestmark = pytest.mark.filterwarnings("ignore")


def masked(*rows: list[int], **columns: Any) -> Dataset:
    """Documents with these labels."""
    return Dataset.from_dict({"input_ids": [[3] * len(row) for row in rows], "labels": list(rows)} | columns)


def ids(*rows: list[int], **columns: Any) -> Dataset:
    """Documents of these tokens, without labels."""
    return Dataset.from_dict({"input_ids": list(rows)} | columns)


def text(*rows: Any) -> Dataset:
    """A column of these values."""
    return Dataset.from_dict({"text": list(rows)})


SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}
CHAT = [{"role": "user", "content": "w1"}]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (tokens(), {}, "train_dataset: got no row; allowed: at least one"),
        (Dataset.from_dict({"body": ["w1"]}), {}, "train_dataset: got no column 'text', only 'body'; allowed: 'text'"),
        (Dataset.from_dict({"prompt": ["w1"]}), {}, "train_dataset: got no column 'text', only 'prompt'; allowed"),
        (tokens(3), {"eval_dataset": tokens()}, "eval_dataset: got no row"),
        (
            tokens(3),
            {"eval_dataset": {"a": tokens(3), "b": Dataset.from_dict({"c": [1]})}},
            "eval_dataset['b']: got no",
        ),
        (tokens(1, 1), {}, "train data set: got no target in 2 documents within max_length=1024 tokens; allowed: at"),
        (tokens(1, 1), {"packing": True, "max_length": 8}, "got no target in 2 documents within max_length=8 tokens"),
        (
            masked([-100, -100], [5, -100, -100]),
            {},
            "train data set: got no target in 2 documents",
        ),
        (
            masked([-100, -100, 5]),
            {"packing": True, "max_length": 2},
            "got no target in 1 documents within max_length=2 tokens",
        ),
        (
            stream(masked([-100, -100], [5, -100, -100])),
            {},
            "train data set: got no target in 2 documents within max_length=1024 tokens; allowed: at least one label",
        ),
        (stream(masked([-100, -100, 5])), {"max_length": 2}, "got no target in 1 documents within max_length=2 tokens"),
        (stream(masked([-100] * 3)), {"packing": True, "packing_strategy": "wrapped"}, "got no target in 1 documents;"),
        pytest.param(
            masked([3, 4, -100, -100]),
            {"max_length": 2, "truncation_mode": "keep_end"},
            "got no target in 1 documents within max_length=2 tokens",
            marks=pytest.mark.skipif(not hasattr(SFTConfig, "truncation_mode"), reason="of TRL since 1.0"),
        ),
        (masked([-100, -100], [5]), SKIP, "train_dataset: got no target in 2 documents; allowed: at least one label"),
        (stream(masked([-100, -100], [5])), SKIP, "train_dataset: got no target in 2 documents; allowed"),
        (tokens(3), SKIP | {"eval_dataset": {"a": masked([5])}}, "eval_dataset['a']: got no target in 1 documents"),
        (text("w1", None), {}, "train_dataset: got None in row 1 of column 'text'; allowed: a string in every row"),
        (text("w1", "w2", None).select([2, 0]), {}, "got None in row 0 of column 'text'"),
        (text(None, None), {}, "got None in row 0 of column 'text'"),
        (text(1, 2), {}, "train_dataset: got 1 in row 0 of column 'text'; allowed: a string in every row (leave"),
        (text(["w1", "w2"]), {}, "got ['w1', 'w2'] in row 0 of column 'text'; allowed: a string"),
        (stream(text(None)), {}, "got None in row 0 of column 'text'"),
        (tokens(3), {"eval_dataset": {"a": text(1.5)}}, "eval_dataset['a']: got 1.5 in row 0 of column 'text'"),
        (
            Dataset.from_dict({"prompt": ["w1", "w2"], "completion": ["w3", None]}),
            {},
            "got None in row 1 of column 'completion'; allowed: a string or a list in every row",
        ),
        (Dataset.from_dict({"messages": [CHAT, None]}), {}, "row 1 of column 'messages'; allowed: a list in every row"),
        (
            Dataset.from_dict({"input_ids": [[3, 4], None]}),
            {},
            "got None in row 1 of column 'input_ids'; allowed: a li",
        ),
        (
            tokens(9, seq_lengths=[[4, 5]]),
            {"packing": True, "max_length": 8},
            "train data set: got a packed row of 9 tokens; allowed: up to max_length=8",
        ),
        (
            masked([-100, -100], seq_lengths=[[1, 1]]),
            {},
            "train data set: got no target in 1 documents",
        ),
        (
            tokens(3),
            {"eval_dataset": masked([-100, -100])},
            "eval data set: got no target in 1 documents",
        ),
        (tokens(3), {"eval_dataset": {"a": tokens(3), "b": tokens(1, 1)}}, "b data set: got no target in 2 documents"),
        (tokens(3), {"packing": True, "max_length": None}, "max_length: got None with packing=True; allowed"),
        (tokens(3), {"packing": True, "max_length": -3}, "max_length: got -3; allowed"),
        (tokens(3), {"max_length": 0}, "max_length: got 0; allowed"),
        (
            ids([3, 4], [5, 6, 48, 49]),
            {},
            "train data set: got 48 in row 1 of column 'input_ids'; allowed: 0 to 47, the model's tokens",
        ),
        (ids([], [3, 4], [-1]), {"padding_free": False}, "got -1 in row 2 of column 'input_ids'; allowed: 0 to 47"),
        (ids([3, -100]), {"packing": True, "max_length": 8}, "got -100 in row 0 of column 'input_ids'"),
        (
            masked([-100, 4], [-100, 5], [48, -100]),
            {"packing": True, "max_length": 8},
            "got 48 in row 2 of column 'labels'; allowed: 0 to 47, the model's tokens, or -100",
        ),
        (masked([3, 4], [5, 6], [-1, 7]).select([2, 0]), {}, "got -1 in row 0 of column 'labels'"),
        (ids([3, 48], seq_lengths=[[1, 1]]), {}, "train data set: got 48 in row 0 of column 'input_ids'"),
        (tokens(3), {"eval_dataset": {"a": ids([3, 48])}}, "a data set: got 48 in row 0 of column 'input_ids'"),
        (ids([3, 4], [48]), SKIP, "train_dataset: got 48 in row 1 of column 'input_ids'"),
        (masked([3, 4], [48]), SKIP | {"padding_free": False}, "train_dataset: got 48 in row 1 of column 'labels'"),
        (stream(ids([3, 48])), {}, "train data set: got 48 in row 0 of column 'input_ids'"),
        (stream(masked([-100, -100], [-100, 50])), {}, "train data set: got 50 in row 1 of column 'labels'"),
        (stream(masked([-100, 48])), SKIP, "train_dataset: got 48 in row 0 of column 'labels'"),
        (tokens(3), {"activation_offloading": True}, "activation_offloading: got True on a CPU; allowed: False"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path: Path, data: Any, options: dict[str, Any], message: str) -> None:
    """A sentence that says what to do, when the trainer is built."""
    with pytest.raises(ValueError) as error:
        make(tmp_path, data, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_that_are_not_taken_may_hold_anything(tmp_path: Path, streamed: bool) -> None:
    """Nulls that were filtered out, or in a column that is not read."""
    data = Dataset.from_dict({"text": ["w1 w2", None, "w3 w4"], "note": [None, "a", None]}).select([0, 2])
    assert make(tmp_path, stream(data) if streamed else data).train().global_step == 6
    rows = tokens(3, 4, text=["w1", None])
    assert make(tmp_path, stream(rows) if streamed else rows).train().global_step == 6


@pytest.mark.parametrize(
    "packing", [False, pytest.param(True, marks=pytest.mark.skipif(LOSES_LABELS, reason="TRL before 1.7: refused"))]
)
def test_a_stream_that_begins_without_a_target(
    tmp_path: Path, packing: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have some later, so that is said, once, and no row is lost; one target in time, and nothing is."""
    monkeypatch.setattr(labels, "STREAM_CHECK", 2)
    late, early = masked([5, -100], [6, -100], [7, 8]), masked([5, -100], [7, 8], [6, -100])
    for data, lines in ((late, 1), (early, 0)):
        caplog.clear()
        trainer = make(tmp_path, stream(data), packing=packing, max_length=8)
        said = [
            record for record in caplog.records if "no target in the first 2 documents within max" in record.message
        ]
        assert [record.levelno for record in said] == [logging.WARNING] * lines
        assert sum(len(row["input_ids"]) for row in trainer.train_dataset) == 6
    assert trainer.train().global_step == 6


@pytest.mark.parametrize("blind", [False, True])
def test_batches_without_a_target_are_said(tmp_path: Path, blind: bool, caplog: pytest.LogCaptureFixture) -> None:
    """By the first step, once; what a collator does to the labels is seen nowhere else."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad(examples)
        return batch | {"labels": torch.full_like(batch["labels"], -100)} if blind else batch

    make(tmp_path, tokens(3, 4), data_collator=collate).train()
    assert caplog.text.count("the first step's batches have no target") == blind


def test_several_data_sets_to_train_on(tmp_path: Path) -> None:
    """What `load_dataset` returns without a split."""
    with pytest.raises(TypeError, match=r"^train_dataset: got a DatasetDict of 'train', 'test'; allowed: one data set"):
        make(tmp_path, DatasetDict({"train": tokens(3), "test": tokens(3)}))


def test_a_run_that_would_train_nothing(tmp_path: Path) -> None:
    """A frozen model; peft freezes adapters that are loaded for inference."""
    model = tiny.model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: got no trainable parameter; allowed: at least one"):
        make(tmp_path, tokens(3), model=model)


def test_bfloat16_on_a_card_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bfloat16 counts as none."""
    trainer = make(tmp_path, tokens(3), model=tiny.model(dtype=torch.bfloat16))
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"^bf16: got bfloat16 on 'Tesla T4', which has none; allowed: fp16=True"):
        check_trainable(trainer.model, trainer.args)


@pytest.mark.parametrize("options", [{}, {"padding_free": False}, {"packing": True, "max_length": 8}])
@pytest.mark.parametrize("rows", [([3, 4], [48, 5]), ([3, 4], [5, -1])])
def test_what_a_stream_brings_later_is_looked_at_as_it_is_read(
    tmp_path: Path, rows: tuple[list[int]], options: dict[str, Any]
) -> None:
    """Before a GPU would only say that it failed."""
    with pytest.raises(ValueError, match=r"^train data set: got (48|-1) in row 1 of column 'input_ids'; allowed: 0 to"):
        make(tmp_path, stream(ids(*rows)), **options).train()


def test_what_a_prepared_stream_brings_later_is_looked_at_in_the_batch(tmp_path: Path) -> None:
    """Nothing of it is looked at as it is read, past the first document with a target."""
    data = tokens(2, 2, labels=[[3, 4], [3, 48]])
    with pytest.raises(ValueError, match=r"^labels: got 48 .* allowed: 0 to 47, or -100"):
        make(tmp_path, stream(data), dataset_kwargs={"skip_prepare_dataset": True}).train()


def test_a_tokenizer_of_more_tokens_than_the_model_is_named(tmp_path: Path) -> None:
    """What is tokenized here is looked at as well; a collator of one's own may make something else of it."""
    model = {"model": tiny.model(vocab_size=40)}
    with pytest.raises(ValueError, match=r"^train data set: got 42 in row 1 of column 'input_ids'; allowed: 0 to 39"):
        make(tmp_path, text("w1 w2", "w3 w39"), **model)
    make(tmp_path, text("w1 w2", "w3 w39"), data_collator=lambda examples: {}, **model)


def test_the_first_token_of_a_document_is_no_target() -> None:
    """With truncation and without; documents without a target are dropped only on request."""
    rows = [[5, -100, 7], [6, -100], [], [8], [-100, 9]]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    require, first_two, last_two = labels.require_targets, Truncation(2), Truncation(2, keep_end=True)
    assert require(data, "train", drop_empty=True)["labels"] == [[5, -100, 7], [-100, 9]]
    assert require(data, "train", first_two, drop_empty=True)["labels"] == [[-100, 9]]
    assert require(data, "train", last_two, drop_empty=True)["labels"] == [[5, -100, 7], [-100, 9]]
    assert require(data, "train") is data
    with pytest.raises(ValueError, match=r"^train: got no target in 1 documents within max_length=2 tokens"):
        require(masked([3, 4, -100, -100]), "train", last_two)
    labels.require_targets_in_stream(masked([3, -100, 4]), "train", last_two)
    with pytest.raises(ValueError, match=r"^train: got no target in 1 documents within max_length=2 tokens"):
        labels.require_targets_in_stream(masked([3, 4, -100, -100]), "train", last_two)


@pytest.mark.parametrize("options", [{"padding_free": False}, {"padding_free": True}, {"packing": True}])
@pytest.mark.parametrize("longest", [8, 12])
def test_what_is_cut_off_is_said(
    tmp_path: Path, options: dict[str, Any], longest: int, caplog: pytest.LogCaptureFixture
) -> None:
    """How much, at which length and what to do, padded, padding-free and packed alike."""
    trainer = make(tmp_path, tokens(3, longest, longest), max_length=8, **options)
    assert sum(len(row) for row in trainer.train_dataset["input_ids"]) == 19
    line = (
        "train data set: 8 tokens are cut off 2 documents of more than max_length=8 tokens; a larger max_length keeps "
        "them whole, packing=True with packing_strategy='bfd_split' in pieces"
    )
    assert [record.message for record in caplog.records if "cut off" in record.message] == [line] * (longest > 8)

"""Data that a trainer refuses when it is built, and the warnings about the others, by the first step."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from tests import tiny
from tests.data.samples import SKIP, first_alone, ids, labelled, stream, text, tokens, trainer_on
from tests.trainer.runs import TRL_DROPS_LABELS
from unsloth_fast.data import labels

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (tokens(), {}, "train_dataset: got no row; allowed: at least one"),
        (Dataset.from_dict({"body": ["w1"]}), {}, "train_dataset: got no column 'text', only 'body'; allowed: 'text'"),
        (tokens(3), {"eval_dataset": tokens()}, "eval_dataset: got no row"),
        (
            tokens(3),
            {"eval_dataset": {"a": tokens(3), "b": Dataset.from_dict({"c": [1]})}},
            "eval_dataset['b']: got no",
        ),
        (tokens(1, 1), {}, "train data set: got no target in 2 documents within max_length=1024 tokens; allowed: at"),
        (tokens(1, 1), {"packing": True, "max_length": 8}, "got no target in 2 documents within max_length=8 tokens"),
        (
            labelled([-100, -100], [5, -100, -100]),
            {},
            "train data set: got no target in 2 documents",
        ),
        (
            labelled([-100, -100, 5]),
            {"packing": True, "max_length": 2},
            "got no target in 1 document within max_length=2 tokens",
        ),
        (
            stream(labelled([-100, -100], [5, -100, -100])),
            {},
            "train data set: got no target in 2 documents within max_length=1024 tokens; allowed: at least one label",
        ),
        (
            stream(labelled([-100, -100, 5])),
            {"max_length": 2},
            "got no target in 1 document within max_length=2 tokens",
        ),
        (
            stream(labelled([-100] * 3)),
            {"packing": True, "packing_strategy": "wrapped"},
            "got no target in 1 document;",
        ),
        pytest.param(
            labelled([3, 4, -100, -100]),
            {"max_length": 2, "truncation_mode": "keep_end"},
            "got no target in 1 document within max_length=2 tokens",
            marks=pytest.mark.skipif(not hasattr(SFTConfig, "truncation_mode"), reason="of TRL since 1.0"),
        ),
        (labelled([-100, -100], [5]), SKIP, "train_dataset: got no target in 2 documents; allowed: at least one label"),
        (stream(labelled([-100, -100], [5])), SKIP, "train_dataset: got no target in 2 documents; allowed"),
        (tokens(3), SKIP | {"eval_dataset": {"a": labelled([5])}}, "eval_dataset['a']: got no target in 1 document"),
        (text("w1", None), {}, "train_dataset: got None in row 1 of column 'text'; allowed: a string in every row"),
        (stream(text(None)), {}, "got None in row 0 of column 'text'"),
        (tokens(3), {"eval_dataset": {"a": text(1.5)}}, "eval_dataset['a']: got 1.5 in row 0 of column 'text'"),
        (
            tokens(9, seq_lengths=[[4, 5]]),
            {"packing": True, "max_length": 8},
            "train data set: got a packed row of 9 tokens; allowed: up to max_length=8",
        ),
        (
            labelled([-100, -100], seq_lengths=[[1, 1]]),
            {},
            "train data set: got no target in 1 document",
        ),
        (
            tokens(3),
            {"eval_dataset": labelled([-100, -100])},
            "eval data set: got no target in 1 document",
        ),
        (tokens(3), {"eval_dataset": {"a": tokens(3), "b": tokens(1, 1)}}, "b data set: got no target in 2 documents"),
        (tokens(3), {"packing": True, "packing_strategy": "ffd"}, "packing_strategy: got 'ffd'; allowed: 'bfd'"),
        (tokens(3), {"packing": True, "max_length": None}, "max_length: got None with packing=True; allowed"),
        (
            ids([3, 4], [5, 6, 48, 49]),
            {},
            "train data set: got 48 in row 1 of column 'input_ids'; allowed: 0 to 47, the model's tokens",
        ),
        (ids([3, 48], seq_lengths=[[1, 1]]), {}, "train data set: got 48 in row 0 of column 'input_ids'"),
        (tokens(3), {"eval_dataset": {"a": ids([3, 48])}}, "a data set: got 48 in row 0 of column 'input_ids'"),
        (ids([3, 4], [48]), SKIP, "train_dataset: got 48 in row 1 of column 'input_ids'"),
        (stream(ids([3, 48])), {}, "train data set: got 48 in row 0 of column 'input_ids'"),
        (stream(labelled([-100, -100], [-100, 50])), {}, "train data set: got 50 in row 1 of column 'labels'"),
        (stream(labelled([-100, 48])), SKIP, "train_dataset: got 48 in row 0 of column 'labels'"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(
    tmp_path: Path, data: Any, options: dict[str, Any], message: str
) -> None:
    """They are refused when the trainer is built. Each refusal is tested in detail with the piece that raises it."""
    with pytest.raises(ValueError) as error:
        trainer_on(tmp_path, data, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_unused_rows_and_columns_may_hold_nulls(tmp_path: Path, streamed: bool) -> None:
    """Rows that were filtered out are unused, and so are columns that are not read."""
    data = Dataset.from_dict({"text": ["w1 w2", None, "w3 w4"], "note": [None, "a", None]}).select([0, 2])
    assert trainer_on(tmp_path, stream(data) if streamed else data).train().global_step == 6
    rows = tokens(3, 4, text=["w1", None])
    assert trainer_on(tmp_path, stream(rows) if streamed else rows).train().global_step == 6


@pytest.mark.parametrize(
    "packing", [False, pytest.param(True, marks=pytest.mark.skipif(TRL_DROPS_LABELS, reason="TRL before 1.7: refused"))]
)
def test_a_stream_that_begins_without_a_target_is_warned_about(
    tmp_path: Path, packing: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning is logged and no row is lost, as targets may come later; a target among the first gives none."""
    monkeypatch.setattr(labels, "STREAM_CHECK", 2)
    late, early = labelled([5, -100], [6, -100], [7, 8]), labelled([5, -100], [7, 8], [6, -100])
    for data, lines in ((late, 1), (early, 0)):
        caplog.clear()
        trainer = trainer_on(tmp_path, stream(data), packing=packing, max_length=8)
        warnings = [
            record for record in caplog.records if "no target in the first 2 documents within max" in record.message
        ]
        assert [record.levelno for record in warnings] == [logging.WARNING] * lines
        assert sum(len(row["input_ids"]) for row in trainer.train_dataset) == 6
    assert trainer.train().global_step == 6


@pytest.mark.parametrize("blind", [False, True])
def test_a_first_step_without_a_target_is_warned_about(
    tmp_path: Path, blind: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning is logged: no earlier check sees the labels that a collator makes."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = first_alone(examples)
        return batch | {"labels": torch.full_like(batch["labels"], -100)} if blind else batch

    trainer_on(tmp_path, tokens(3, 4), data_collator=collate).train()
    assert caplog.text.count("the first step's batches have no target") == blind


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    model = tiny.model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: got no trainable parameter; allowed: at least one"):
        trainer_on(tmp_path, tokens(3), model=model)


@pytest.mark.parametrize("options", [{}, {"padding_free": False}, {"packing": True, "max_length": 8}])
@pytest.mark.parametrize("rows", [([3, 4], [48, 5]), ([3, 4], [5, -1])])
def test_a_stream_is_checked_as_it_is_read(tmp_path: Path, rows: tuple[list[int]], options: dict[str, Any]) -> None:
    """A GPU would only report a failure."""
    with pytest.raises(ValueError, match=r"^train data set: got (48|-1) in row 1 of column 'input_ids'; allowed: 0 to"):
        trainer_on(tmp_path, stream(ids(*rows)), **options).train()


def test_a_prepared_stream_is_checked_in_each_batch(tmp_path: Path) -> None:
    """When it is read, it is checked only up to the first document with a target."""
    data = tokens(2, 2, labels=[[3, 4], [3, 48]])
    with pytest.raises(ValueError, match=r"^labels: got 48 .* allowed: 0 to 47, or -100"):
        trainer_on(tmp_path, stream(data), **SKIP).train()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    """Texts that the trainer tokenizes are checked, too; not with a user's collator, which may change the tokens."""
    model = {"model": tiny.model(vocab_size=40)}
    with pytest.raises(ValueError, match=r"^train data set: got 42 in row 1 of column 'input_ids'; allowed: 0 to 39"):
        trainer_on(tmp_path, text("w1 w2", "w3 w39"), **model)
    trainer_on(tmp_path, text("w1 w2", "w3 w39"), data_collator=lambda examples: {}, **model)


@pytest.mark.parametrize("options", [{"padding_free": False}, {"padding_free": True}, {"packing": True}])
@pytest.mark.parametrize("longest", [8, 12])
def test_the_number_of_truncated_tokens_is_logged(
    tmp_path: Path, options: dict[str, Any], longest: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The line has the maximum length and a remedy; it is the same for padded, padding-free and packed batches."""
    trainer = trainer_on(tmp_path, tokens(3, longest, longest), max_length=8, **options)
    assert sum(len(row) for row in trainer.train_dataset["input_ids"]) == 19
    line = (
        "train data set: max_length=8 cuts 8 tokens off 2 documents; a larger max_length keeps documents whole, "
        "packing=True with packing_strategy='bfd_split' in pieces"
    )
    assert [record.message for record in caplog.records if " cuts " in record.message] == [line] * (longest > 8)

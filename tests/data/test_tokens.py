"""Columns of tokens and of one value per token: refusals that name the row, and rows without a token."""

import logging
from typing import Any

import pytest
from datasets import Dataset, Features, Sequence, Value

from tests.data.samples import ids, labelled, stream, tokens
from unsloth_fast.data.tokens import (
    check_tokens,
    check_tokens_while_reading,
    require_tokens,
    without_empty_rows,
)

ROWS = ([3, 4, 5], [6, 7])
PER_TOKEN = "allowed: a list of integers, one per token of 'input_ids'"


def beside(**columns: Any) -> Dataset:
    """Two documents, and these columns."""
    return ids(*ROWS, **columns)


def check(data: Any) -> None:
    check_tokens(data, "train data set", next(iter(data)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (beside(labels=[0, 1]), f"got 0 in row 0 of column 'labels'; {PER_TOKEN} (rename or drop the column if"),
        (beside(labels=["good", "bad"]), f"got 'good' in row 0 of column 'labels'; {PER_TOKEN} (rename"),
        (beside(labels=[["a"] * 3, ["b"] * 2]), f"got ['a', 'a', 'a'] in row 0 of column 'labels'; {PER_TOKEN}"),
        (beside(labels=[[3.0, 4.0, 5.0], [6.0, 7.0]]), f"got [3.0, 4.0, 5.0] in row 0 of column 'labels'; {PER_TOKEN}"),
        (beside(labels=[[0, 1], [1, 0]]), "got 2 values in row 0 of column 'labels'; allowed: 3, one per token of"),
        (beside(labels=[[3, 4, 5], [0]]), "got 1 value in row 1 of column 'labels'; allowed: 2, one per token of"),
        (beside(labels=[[3, 4, 5], None]), f"got None in row 1 of column 'labels'; {PER_TOKEN}"),
        (beside(labels=[[3, 4, 5], [None, 7]]), f"got [None, 7] in row 1 of column 'labels'; {PER_TOKEN}"),
        (beside(labels=[[[3], [4], [5]], [[6], [7]]]), f"got [[3], [4], [5]] in row 0 of column 'labels'; {PER_TOKEN}"),
        (beside(completion_mask=[[1], [1]]), "got 1 value in row 0 of column 'completion_mask'; allowed: 3, one per"),
        (beside(assistant_masks=["x", "y"]), f"got 'x' in row 0 of column 'assistant_masks'; {PER_TOKEN}"),
        (beside(seq_lengths=[3, 2]), "got 3 in row 0 of column 'seq_lengths'; allowed: a list of integers"),
        (
            beside(seq_lengths=[[1, 2], [1]]),
            "got lengths of 1 token in row 1 of column 'seq_lengths'; allowed: 2,",
        ),
        (ids([3.0], [4.0]), "got [3.0] in row 0 of column 'input_ids'; allowed: a list of integers"),
        (ids([[3, 4]], [[5]]), "got [[3, 4]] in row 0 of column 'input_ids'; allowed: a list of integers"),
        (Dataset.from_dict({"input_ids": ["ab"]}), "got 'ab' in row 0 of column 'input_ids'; allowed: a list of"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_other_values_beside_tokens_are_refused(data: Dataset, message: str, streamed: bool) -> None:
    """A data set is refused as a whole, a stream when it reads the row."""
    with pytest.raises(ValueError) as error:
        if streamed:
            list(check_tokens_while_reading(stream(data), "train data set"))
        else:
            check(data)
    assert str(error.value).startswith(f"train data set: {message}")


FIXED = Features({"input_ids": Sequence(Value("int32"), length=2), "labels": Sequence(Value("int64"), length=2)})


@pytest.mark.parametrize(
    "data",
    [
        tokens(3, 0, 2),
        labelled([-100, 4], [5]),
        beside(labels=[None, None], seq_lengths=[None, None]),
        beside(completion_mask=[[False, True, True], [True, True]], assistant_masks=[[0.0, 1.0, 1.0], [1.0, 1.0]]),
        beside(seq_lengths=[[1, 2], [2]], label=["a", "b"], attention_mask=[[1], [1]]),
        ids([], [], labels=[[], []]),
        tokens(3, 2).select([1]),
        tokens(3, 2).with_format("torch"),
        Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]}, features=FIXED),
    ],
)
def test_one_value_per_token_passes(data: Dataset) -> None:
    """Masks may hold any number; a column without any value counts as absent; other columns are not read."""
    check(data)
    if data[0].get("labels", ()) is not None:
        assert len(list(check_tokens_while_reading(data.to_iterable_dataset(), "train data set"))) == len(data)


def test_a_packed_row_of_a_stream_may_not_be_truncated() -> None:
    rows = check_tokens_while_reading(stream(beside(seq_lengths=[[1, 2], [2]])), "train data set", 2)
    with pytest.raises(ValueError, match=r"^train data set: got a packed row of 3 tokens; allowed: up to max_length=2"):
        list(rows)


def test_rows_without_a_token_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    data = tokens(0, 3, 0, 2, note=["a", "b", "c", "d"])
    assert without_empty_rows(data, "train data set")["note"] == ["b", "d"]
    assert [record.message for record in caplog.records] == ["train data set: rows without a token are dropped: 2 of 4"]
    assert without_empty_rows(data.select([1]), "eval")["note"] == ["b"] and len(caplog.records) == 1


def test_rows_of_a_stream_without_a_token_are_dropped_as_they_are_read(caplog: pytest.LogCaptureFixture) -> None:
    """The log says so once."""
    rows = without_empty_rows(stream(tokens(0, 3, 0, 2)), "train data set")
    require_tokens(rows, "train data set")
    assert [len(row["input_ids"]) for _ in range(2) for row in rows] == [3, 2, 3, 2]
    line = "train data set: rows without a token are dropped as they are read"
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.WARNING, line)]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_data_set_without_any_token_is_refused(streamed: bool) -> None:
    message = f"got no token in {'any row' if streamed else '2 rows'}; allowed: at least one row with a token"
    with pytest.raises(ValueError, match=f"^train data set: {message}$"):
        rows = without_empty_rows(stream(ids([], [])) if streamed else ids([], []), "train data set")
        require_tokens(rows, "train data set")

"""Preparation of a data set, with a recording stand-in for TRL's own: what TRL is asked for, and which rows result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig

import unsloth_ref.training
from tests import tiny
from tests.data.samples import ids, labelled, stream, text, tokens
from tests.trainer.runs import arguments
from unsloth_fast.data.preparation import Preparation

Call = tuple[SFTConfig, bool, Any]


class RecordingTrl:
    """TRL's preparation, which keeps the arguments of each call.

    It truncates at the end, and packs nothing.
    """

    def __init__(self, lose_labels: bool = False) -> None:
        self.calls: list[Call] = []
        self.lose_labels = lose_labels

    def __call__(
        self, dataset: Any, processing_class: Any, args: SFTConfig, packing: bool = False, formatting_func: Any = None
    ) -> Any:
        self.calls.append((args, packing, formatting_func))
        if args.max_length is not None:
            dataset = dataset.map(lambda row: {name: row[name][: args.max_length] for name in row})
        return dataset.remove_columns("labels") if self.lose_labels and packing else dataset


@pytest.fixture
def args_of(tmp_path: Path) -> Callable[..., SFTConfig]:
    """Make a `trl.SFTConfig` with these fields."""
    return lambda **options: arguments(tmp_path, SFTConfig, **{"max_length": 4} | options)


def prepare(
    data: Any, args: SFTConfig, packing: bool = False, completion_only: bool = False, **options: Any
) -> tuple[Any, list[Call]]:
    """The rows, and the calls of TRL's preparation."""
    by_trl = RecordingTrl(options.pop("lose_labels", False))
    preparation = Preparation(by_trl, unsloth_ref.training, options.pop("vocabulary", 48), completion_only, False)
    return preparation(data, "train data set", tiny.tokenizer(), args, packing, **options), by_trl.calls


def test_all_of_a_text_is_tokenized_and_truncated_later(args_of: Callable[..., SFTConfig]) -> None:
    """Labels and checks come between the two calls of TRL; the text is formatted before both."""

    def formatting_func(row: Any) -> str:
        return row["text"]

    args = args_of(max_length=2)
    rows, (tokenizing, truncating) = prepare(text("w7", "w8"), args, formatting_func=formatting_func)
    assert (tokenizing[0].max_length, *tokenizing[1:]) == (None, False, None)
    assert truncating == (args, False, None) and args.max_length == 2
    assert rows["input_ids"] == rows["labels"] == [[10, 1], [11, 1]]


def test_documents_that_are_not_packed_keep_their_rows(args_of: Callable[..., SFTConfig]) -> None:
    """Documents without a target keep theirs too."""
    rows, _ = prepare(tokens(3, 6, 1), args_of())
    assert rows["input_ids"] == rows["labels"] == [[3, 4, 5], [3, 4, 5, 6], [3]]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("bfd", [[3, 4, 5, 6], [3, 4, 5]]),
        ("bfd_split", [[3, 4, 5, 6], [3, 4, 5], [7, 8]]),
        ("wrapped", [[3, 4, 5, 3], [4, 5, 6, 7], [8, 3]]),
    ],
)
def test_documents_are_packed_as_a_whole_and_not_by_trl(
    args_of: Callable[..., SFTConfig], strategy: str, expected: list[list[int]]
) -> None:
    """With "wrapped" a document without a target stays, as the rows of its neighbours depend on it."""
    args = args_of(packing_strategy=strategy)
    rows, calls = prepare(tokens(3, 6, 1, name=["a", "b", "c"]), args, packing=True)
    assert [(call[0].max_length, *call[1:]) for call in calls] == [(None, False, None)]
    assert sorted(map(sorted, rows["input_ids"])) == sorted(map(sorted, expected))
    assert ("seq_lengths" in rows.column_names, "document_spans" in rows.column_names) == (
        strategy != "wrapped",
        strategy != "bfd",
    )


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_a_completion_mask_becomes_labels(
    args_of: Callable[..., SFTConfig], completion_only: bool, packing: bool
) -> None:
    data = ids([3, 4, 5], completion_mask=[[0, 0, 1]])
    rows, _ = prepare(data, args_of(), packing, completion_only)
    assert rows["labels"] == [[-100, -100, 5] if completion_only else [3, 4, 5]]
    assert "completion_mask" not in rows.column_names


@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks"])
def test_a_mask_keeps_the_begin_token_of_the_next_document_out(args_of: Callable[..., SFTConfig], mask: str) -> None:
    """It does so also where documents follow one another in a row that counts as one document."""
    data = ids([1, 4, 5], [1, 6, 7, 8, 9], [1, 10]).add_column(mask, [[0, 0, 1], [0, 1, 1, 1, 1], [0, 1]])
    rows, _ = prepare(data, args_of(packing_strategy="wrapped"), True, True)
    assert rows["input_ids"] == [[1, 4, 5, 1], [6, 7, 8, 9], [1, 10]]
    assert rows["labels"] == [[-100, -100, 5, -100], [6, 7, 8, 9], [-100, 10]]


@pytest.mark.skipif(not hasattr(SFTConfig, "shuffle_dataset"), reason="TRL's field since 0.26")
def test_documents_and_packed_rows_are_shuffled_on_request(args_of: Callable[..., SFTConfig]) -> None:
    """The run's seed determines the order; TRL does not shuffle a second time."""
    data = ids(*([token, token] for token in range(20)))
    orders = []
    for options in ({}, {"shuffle_dataset": True}, {"shuffle_dataset": True}, {"shuffle_dataset": True, "seed": 7}):
        args = args_of(**options)
        rows, calls = prepare(data, args, packing=True)
        assert not any(call[0].shuffle_dataset for call in calls)
        assert sorted(token for row in rows["input_ids"] for token in row) == sorted(2 * [*range(20)])
        orders.append(rows["input_ids"])
    assert orders[0] == [[first, first, first + 1, first + 1] for first in range(0, 20, 2)]
    assert orders[1] == orders[2] and orders[0] != orders[1] != orders[3]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_already_packed_are_neither_truncated_nor_packed(
    args_of: Callable[..., SFTConfig], packing: bool
) -> None:
    data = tokens(4, 3, seq_lengths=[[2, 2], [3]])
    rows, calls = prepare(data, args_of(), packing)
    assert [(call[0].max_length, call[1]) for call in calls] == [(None, False)]
    assert rows.to_list() == data.to_list()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (tokens(5, seq_lengths=[[2, 3]]), {}, "got a packed row of 5 tokens; allowed: up to max_length=4"),
        (labelled([-100, -100], seq_lengths=[[1, 1]]), {}, "got no target in 1 document;"),
        (ids([3, 48], seq_lengths=[[1, 1]]), {}, "got 48 in row 0 of column 'input_ids'"),
        (ids([3, 48]), {}, "got 48 in row 0 of column 'input_ids'"),
        (labelled([3, 48]), {"packing": True}, "got 48 in row 0 of column 'labels'"),
        (labelled([-100] * 4 + [5]), {}, "got no target in 1 document within max_length=4 tokens"),
        (labelled([-100] * 4 + [5]), {"packing": True}, "got no target in 1 document within max_length=4 tokens"),
        (ids([3, 4], completion_mask=[[1, 0]]), {"completion_only": True}, "got no target in 1 document"),
        (stream(labelled([-100] * 4 + [5])), {}, "got no target in 1 document within max_length=4 tokens"),
        (stream(ids([3, 48])), {}, "got 48 in row 0 of column 'input_ids'"),
        (stream(ids([3, 4], completion_mask=[[1, 0]])), {"completion_only": True}, "got no target in 1 document"),
        (stream(tokens(3)), {"packing": True, "lose_labels": True}, "got a stream with labels to pack, which the"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(
    args_of: Callable[..., SFTConfig], data: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        prepare(data, args_of(), **options)
    assert str(error.value).startswith(f"train data set: {message}")


def test_packing_needs_a_maximum_length(args_of: Callable[..., SFTConfig]) -> None:
    """TRL is not called without one."""
    by_trl = RecordingTrl()
    preparation = Preparation(by_trl, unsloth_ref.training, 48, False, False)
    with pytest.raises(ValueError, match=r"^max_length: got None with packing=True; allowed: an integer from 1, the"):
        preparation(tokens(3), "train data set", tiny.tokenizer(), args_of(max_length=None), True)
    assert by_trl.calls == []


def test_an_unknown_vocabulary_is_not_checked(args_of: Callable[..., SFTConfig]) -> None:
    rows, _ = prepare(ids([3, 10**6]), args_of(), vocabulary=None)
    assert rows["input_ids"] == [[3, 10**6]]


@pytest.mark.parametrize("packing", [False, True])
def test_trl_truncates_and_packs_a_stream(args_of: Callable[..., SFTConfig], packing: bool) -> None:
    """The stream is tokenized first and checked as it is read."""
    args = args_of()
    rows, (tokenizing, last) = prepare(stream(tokens(3, 6)), args, packing)
    assert (tokenizing[0].max_length, tokenizing[1]) == (None, False)
    assert last == (args, packing, None)
    assert [row["input_ids"] for row in rows] == [[3, 4, 5], [3, 4, 5, 6]]


def test_a_stream_is_checked_as_it_is_read(args_of: Callable[..., SFTConfig]) -> None:
    rows, _ = prepare(stream(ids([3, 4], [48, 5])), args_of())
    with pytest.raises(ValueError, match=r"^train data set: got 48 in row 1 of column 'input_ids'"):
        list(rows)


def test_the_given_data_set_is_not_changed(args_of: Callable[..., SFTConfig]) -> None:
    data = Dataset.from_dict({"input_ids": [[3, 4], [5]], "completion_mask": [[0, 1], [0]]})
    before = data.to_list()
    prepare(data, args_of(), True, True)
    assert data.to_list() == before

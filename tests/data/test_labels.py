"""Labels: which tokens are targets, and the refusal of data without any."""

import logging
from typing import Any

import pytest
from datasets import Dataset

from tests.data.samples import ids, labelled, stream, text, tokens
from unsloth_fast.data import labels
from unsloth_fast.data.labels import (
    labels_of,
    require_kept_labels,
    require_targets,
    require_targets_in_stream,
    with_labels,
)
from unsloth_fast.data.truncation import Truncation
from unsloth_ref.checks import counted

FIRST_TWO, LAST_TWO = Truncation(2), Truncation(2, keep_end=True)
WITHIN_TWO = r"^train: got no target in 1 document within max_length=2 tokens; allowed: at least one label"


@pytest.mark.parametrize(
    ("masks", "completion_only", "expected"),
    [
        ({}, True, [4, 5, 6]),
        ({"completion_mask": [0, 0, 1]}, True, [-100, -100, 6]),
        ({"completion_mask": [0, 0, 1]}, False, [4, 5, 6]),
        ({"assistant_masks": [0, 1, 1]}, False, [-100, 5, 6]),
        ({"assistant_masks": [1, 1, 0], "completion_mask": [0, 1, 1]}, True, [-100, 5, -100]),
        ({"assistant_masks": [1, 1, 0], "completion_mask": [0, 1, 1]}, False, [4, 5, -100]),
    ],
)
def test_labels_are_the_tokens_that_no_mask_excludes(
    masks: dict[str, Any], completion_only: bool, expected: list[int]
) -> None:
    """This holds for one example and for a whole data set, which loses the columns of masks."""
    assert labels_of({"input_ids": [4, 5, 6]} | masks, completion_only) == {"labels": expected}
    made = with_labels(ids([4, 5, 6], **{name: [mask] for name, mask in masks.items()}), completion_only)
    assert made.column_names == ["input_ids", "labels"]
    assert made["labels"] == [expected]


def test_labels_that_exist_are_kept() -> None:
    """They are kept even where a mask would exclude a token."""
    masked = {"completion_mask": [0, 0], "assistant_masks": [0, 0]}
    assert labels_of({"input_ids": [4, 5], "labels": [4, -100]} | masked, True) == {}
    data = labelled([4, -100], completion_mask=[[0, 0]])
    assert with_labels(data, True) is data


def test_rows_without_tokens_get_no_labels() -> None:
    data = text("w1")
    assert with_labels(data, True) is data


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        labels_of({"input_ids": [4, 5, 6], "assistant_masks": [1, 1]}, False)


@pytest.mark.parametrize(
    ("truncation", "with_target"),
    [(None, [0, 4]), (FIRST_TWO, [4]), (LAST_TWO, [0, 4]), (Truncation(3), [0, 4])],
    ids=str,
)
def test_the_first_token_of_a_document_is_not_a_target(truncation: Truncation | None, with_target: list[int]) -> None:
    """Before truncation this is the first token of the document, after it the first that is kept."""
    data = labelled([5, -100, 7], [6, -100], [], [8], [-100, 9])
    kept = require_targets(data, "train", truncation, drop_empty=True)
    assert kept["labels"] == [data["labels"][row] for row in with_target]


@pytest.mark.parametrize("truncation", [FIRST_TWO, LAST_TWO], ids=str)
def test_no_target_within_the_maximum_length(truncation: Truncation) -> None:
    """A data set and a stream are refused; the refusal names the length."""
    rows = labelled([3, 4, -100, -100] if truncation.keep_end else [3, -100, 4])
    for require in (require_targets, require_targets_in_stream):
        with pytest.raises(ValueError, match=WITHIN_TWO):
            require(rows, "train", truncation)
        require(rows, "train")


def test_documents_without_a_target_are_dropped_only_on_request(caplog: pytest.LogCaptureFixture) -> None:
    """Whether they are dropped or not, their number is logged."""
    data = labelled([5, 6], [7], [-100, -100])
    assert require_targets(data, "train") is data
    assert require_targets(data, "train", drop_empty=True)["labels"] == [[5, 6]]
    line = "train: documents without a target do not change the loss: 2 of 3"
    assert [record.message for record in caplog.records] == [line] * 2


def test_a_data_set_full_of_targets_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    data = tokens(2, 4)
    assert require_targets(data, "train", Truncation(4), drop_empty=True) is data
    assert caplog.records == []


def test_the_number_of_truncated_tokens_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    require_targets(tokens(8, 2, 5), "train", Truncation(4))
    assert [record.message for record in caplog.records] == [
        "train: max_length=4 cuts 5 tokens off 2 documents; a larger max_length keeps documents whole, packing=True "
        "with packing_strategy='bfd_split' in pieces"
    ]


@pytest.mark.parametrize("data", [labelled([-100, -100], [5]), labelled([], [5]), labelled([5, -100])])
def test_a_data_set_without_a_target_is_refused(data: Dataset) -> None:
    message = (
        rf"^train: got no target in {counted(len(data), 'document')}; allowed: at least one label that is not -100 "
    )
    for require in (require_targets, require_targets_in_stream):
        with pytest.raises(ValueError, match=message):
            require(data, "train")


@pytest.mark.parametrize(
    ("rows", "level"),
    [
        ([[5, -100], [7, 8], [6, -100]], None),
        ([[5, -100], [6, -100], [7, 8]], logging.WARNING),
        ([[5, -100], [6, -100]], logging.WARNING),
    ],
    ids=["a target in time", "a target later", "no target"],
)
def test_only_the_first_documents_of_a_stream_are_searched(
    rows: list[list[int]], level: int | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After that a warning is logged, as a target may come later."""
    monkeypatch.setattr(labels, "STREAM_CHECK", 2)
    read: list[int] = []

    def documents() -> Any:
        for row in rows:
            read.append(len(row))
            yield {"input_ids": row, "labels": row}

    require_targets_in_stream(documents(), "train")
    assert len(read) == 2
    assert [record.levelno for record in caplog.records] == ([level] if level else [])
    assert all("train: got no target in the first 2 documents;" in record.message for record in caplog.records)


def test_a_stream_without_labels_is_searched_by_its_masks() -> None:
    """A completion_mask counts only where completions alone are trained on."""
    data = stream(ids([4, 5], completion_mask=[[1, 0]]))
    require_targets_in_stream(data, "train", completion_only=False)
    with pytest.raises(ValueError, match=r"^train: got no target in 1 document;"):
        require_targets_in_stream(data, "train", completion_only=True)


@pytest.mark.parametrize(
    ("given", "prepared", "refused"),
    [
        (tokens(2), ids([3, 4]), True),
        (tokens(2), tokens(2), False),
        (ids([3, 4]), ids([3, 4]), False),
        (tokens(2), [], False),
    ],
    ids=["lost", "kept", "never there", "no rows left"],
)
def test_a_stream_whose_labels_are_lost_is_refused(given: Any, prepared: Any, refused: bool) -> None:
    """TRL before 1.7 packs the tokens alone."""
    if not refused:
        require_kept_labels(given, prepared, "train")
        return
    with pytest.raises(ValueError, match=r"^train: got a stream with labels to pack, which the installed trl drops"):
        require_kept_labels(given, prepared, "train")

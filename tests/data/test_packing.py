"""Packing a data set: rows in parts of a plan, the refusal of rows that are too long, and the log."""

import logging
from types import ModuleType

import pytest

import unsloth_fast.training
import unsloth_ref.training
from tests.data.samples import labelled, tokens
from unsloth_fast.data import packing
from unsloth_fast.data.packing import check_packed_rows, log_packing, pack_dataset

PACKAGES = [unsloth_ref.training, unsloth_fast.training]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("copied", [1, 5, 16, 2**24])
def test_rows_do_not_depend_on_how_many_tokens_are_copied_at_a_time(
    package: ModuleType, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are the same down to one row at a time, and every column moves with the tokens."""
    monkeypatch.setattr(packing, "COPIED_TOKENS", copied)
    data = labelled([1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11])
    packed = pack_dataset(data, 6, "bfd", package)
    assert packed["labels"] == [[1, 2, 3, 4, 5, 8], [9, 10, 11, 6, 7]]
    assert packed["input_ids"] == [[3] * 6, [3] * 5]
    assert packed["seq_lengths"] == [[5, 1], [3, 2]]


@pytest.mark.parametrize("max_length", [None, 4, 5])
def test_packed_rows_up_to_the_maximum_length_pass(max_length: int | None) -> None:
    check_packed_rows(tokens(3, 4), "train data set", max_length)
    check_packed_rows(tokens(3).select([]), "train data set", max_length)


def test_a_packed_row_that_is_too_long_is_refused() -> None:
    """Truncation would cut its documents."""
    with pytest.raises(ValueError, match=r"^train data set: got a packed row of 4 tokens; allowed: up to max_length=3"):
        check_packed_rows(tokens(3, 4), "train data set", 3)


def test_the_share_of_the_rows_that_is_filled_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unsloth_fast")
    documents = tokens(5, 2, 1, 3)
    log_packing(documents, pack_dataset(documents, 8, "bfd", unsloth_ref.training), "train data set", 8)
    (record,) = caplog.records
    assert record.message == "train data set: 4 documents of 11 tokens packed into 2 rows of 8, 68.8 % full"

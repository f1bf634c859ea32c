"""Tokens and labels outside the vocabulary: the error names the first value and its row."""

from typing import Any

import pytest

from tests.data.samples import ids, labelled, stream, text
from unsloth_fast.data.vocabulary import check_vocabulary, check_while_reading

WRONG = [
    (ids([3, 4], [5, 6, 48, 49]), "got 48 in row 1 of column 'input_ids'; allowed: 0 to 47, the model's tokens"),
    (ids([3, 4], [5, -1]), "got -1 in row 1 of column 'input_ids'; allowed: 0 to 47"),
    (ids([3, -100]), "got -100 in row 0 of column 'input_ids'; allowed: 0 to 47"),
    (ids([], [3, 4], [], [-1]), "got -1 in row 3 of column 'input_ids'"),
    (labelled([-100, 4], [-100, 5], [48, -100]), "got 48 in row 2 of column 'labels'; allowed: 0 to 47, the model's"),
    (labelled([-1, 4]), "got -1 in row 0 of column 'labels'; allowed: 0 to 47, the model's tokens, or -100"),
    (labelled([3, 4], [5, 6], [-1, 7]).select([2, 0]), "got -1 in row 0 of column 'labels'"),
]


@pytest.mark.parametrize(("data", "message"), WRONG)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_value_outside_the_vocabulary_is_named(data: Any, message: str, streamed: bool) -> None:
    """A stream raises when it reads the row."""
    with pytest.raises(ValueError) as error:
        if streamed:
            list(check_while_reading(stream(data), "train", 48))
        else:
            check_vocabulary(data, "train", 48)
    assert str(error.value).startswith(f"train: {message}")


@pytest.mark.parametrize(
    "data", [ids([0, 47], []), labelled([-100, 47], [0, -100]), text("w48"), ids([48]).remove_columns("input_ids")]
)
def test_data_within_the_vocabulary_pass(data: Any) -> None:
    """Columns of other names and types are not checked."""
    check_vocabulary(data, "train", 48)
    assert list(check_while_reading(stream(data), "train", 48)) == data.to_list()


def test_an_unknown_vocabulary_allows_every_value() -> None:
    data, rows = ids([3, 10**6, -7]), stream(ids([3, 10**6, -7]))
    check_vocabulary(data, "train", None)
    assert check_while_reading(rows, "train", None) is rows


def test_a_stream_is_checked_no_further_than_it_is_read() -> None:
    rows = iter(check_while_reading(stream(ids([3], [4], [48])), "train", 48))
    assert [next(rows)["input_ids"], next(rows)["input_ids"]] == [[3], [4]]
    with pytest.raises(ValueError, match="got 48 in row 2"):
        next(rows)

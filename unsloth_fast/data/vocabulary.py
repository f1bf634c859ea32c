"""Tokens and labels outside the model's vocabulary: refused by row and value. A GPU would only report a failure."""

from typing import Any

import numpy as np
from datasets import IterableDataset

from unsloth_fast.data.lists import flat, has_lists
from unsloth_ref.types import IGNORE_INDEX


def check_vocabulary(dataset: object, name: str, vocabulary: int | None) -> None:
    """Refuse a token or a label that the model does not have.

    Args:
        dataset: its columns "input_ids" and "labels", where it has them, are checked as a whole.
        name: of the data set, for messages.
        vocabulary: how many tokens the model has; None if that is not known.

    Raises:
        ValueError: the first value outside the vocabulary, and its row.
    """
    for column in ("input_ids", "labels"):
        if vocabulary is not None and has_lists(dataset, column):
            values, lengths = flat(dataset, column)
            _check_values(name, column, values.to_numpy(zero_copy_only=False), vocabulary, lengths.cumsum())


def check_while_reading(dataset: IterableDataset, name: str, vocabulary: int | None) -> IterableDataset:
    """The stream, which raises as `check_vocabulary` does when it reads such a row."""
    if vocabulary is None:
        return dataset
    return dataset.map(_checked, with_indices=True, fn_kwargs={"name": name, "vocabulary": vocabulary})


def _checked(row: dict[str, Any], index: int, name: str, vocabulary: int) -> dict[str, Any]:
    for column in ("input_ids", "labels"):
        values = np.asarray(row.get(column, ()))
        _check_values(name, column, values, vocabulary, np.array([len(values)]), index)
    return row


def _check_values(
    name: str, column: str, values: np.ndarray, vocabulary: int, ends: np.ndarray, first_row: int = 0
) -> None:
    """Raise for a value outside the vocabulary; row i ends before ends[i] among the values."""
    wrong = (values < 0) | (values >= vocabulary)
    if column == "labels":
        wrong &= values != IGNORE_INDEX
    if wrong.any():
        at = int(wrong.argmax())
        row = first_row + int(np.searchsorted(ends, at, side="right"))
        raise ValueError(
            f"{name}: got {int(values[at])} in row {row} of column {column!r}; allowed: 0 to {vocabulary - 1}, the "
            f"model's tokens{f', or {IGNORE_INDEX}' if column == 'labels' else ''}"
        )

"""Columns of tokens, and of one value per token: their types and lengths, and rows without a token."""

import reprlib
from collections.abc import Mapping, Sized
from typing import Any, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from unsloth_fast.data.lists import (
    RowsWith,
    arrow_column,
    flat,
    has_lists,
    is_plain,
    list_lengths,
    row_with,
    without_rows,
)
from unsloth_fast.data.types import DataSet, Row, Rows
from unsloth_ref.checks import counted

_MASKS = ("completion_mask", "assistant_masks")
_COLUMNS = ("input_ids", "labels", *_MASKS, "seq_lengths")


def check_tokens(dataset: Rows, name: str, first: Row) -> None:
    """Refuse columns beside the tokens that hold something else, such as classes in "labels".

    Args:
        dataset: with a column "input_ids"; of a stream, or under a transform, only the first row is checked.
        name: of the data set, for messages.
        first: its first row.

    Raises:
        ValueError: the first value of another type or length.
    """
    if not is_plain(dataset):
        check_row(first, 0, name)
        return
    for column in _COLUMNS:
        if column in dataset.column_names and (row := _wrong_row(dataset, column)) is not None:
            check_row({"input_ids": [], **dataset.with_format(None)[row]}, row, name)


def check_row(row: Row, index: int, name: str) -> None:
    """`check_tokens` for one row, whose number is `index`."""
    for column in _COLUMNS:
        if column not in row:
            continue
        values: Any = row[column]
        if not _is_column(values, column):
            rest = "" if column in ("input_ids", "seq_lengths") else f", one per token of 'input_ids'{_remedy(column)}"
            raise ValueError(
                f"{name}: got {reprlib.repr(values)} in row {index} of column {column!r}; allowed: a list of integers"
                f"{rest}"
            )
        of_tokens: Any = row["input_ids"]
        count, tokens = int(sum(values)) if column == "seq_lengths" else len(values), len(of_tokens)
        if count != tokens:
            found = f"lengths of {counted(count, 'token')}" if column == "seq_lengths" else counted(count, "value")
            raise ValueError(
                f"{name}: got {found} in row {index} of column {column!r}; allowed: {tokens}, one per token of "
                f"'input_ids'{_remedy(column)}"
            )


def check_tokens_while_reading(dataset: IterableDataset, name: str, max_length: int | None = None) -> IterableDataset:
    """The stream, which raises as `check_tokens`, and for packed rows `check_packed_rows`, when it reads such a row."""
    return dataset.map(_checked, with_indices=True, fn_kwargs={"name": name, "max_length": max_length})


def _checked(row: dict[str, Any], index: int, name: str, max_length: int | None) -> dict[str, Any]:
    check_row(row, index, name)
    if "seq_lengths" in row:
        check_packed_length(len(row["input_ids"]), name, max_length)
    return {}


def check_packed_length(longest: int, name: str, max_length: int | None) -> None:
    """Refuse a row that was packed earlier and is longer than max_length: truncation would cut documents apart.

    Raises:
        ValueError: its length, and what is allowed.
    """
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"{name}: got a packed row of {longest} tokens; allowed: up to max_length={max_length} (raise it, "
            "or give the documents themselves, without the column 'seq_lengths')"
        )


def has_packed_rows(dataset: object) -> bool:
    """Whether rows of tokens hold several documents; for a stream, whether its first row has the lengths of some."""
    if isinstance(dataset, Dataset):
        lengths = list_lengths(dataset, "seq_lengths") if has_lists(dataset, "seq_lengths") else None
        return "input_ids" in dataset.column_names and lengths is not None and lengths.max(initial=0) > 1
    rows: Any = dataset
    first = next(iter(rows), None) or {}
    return "input_ids" in first and first.get("seq_lengths") is not None


def refuse_packed_rows(dataset: object, name: str, reason: str) -> None:
    """Refuse rows that were packed earlier where batches are padded: their documents would see each other.

    Raises:
        ValueError: the reason why batches are padded, and what is allowed.
    """
    if has_packed_rows(dataset):
        raise ValueError(
            f"{name}: got packed rows (the column 'seq_lengths'), and padded batches, because {reason}; allowed: "
            "padding-free batches, or the documents themselves, without the column 'seq_lengths'"
        )


def require_tokens(dataset: IterableDataset, name: str) -> None:
    """Refuse a stream without rows, after those without a token were dropped.

    Raises:
        ValueError: no rows are left.
    """
    if next(iter(dataset), None) is None:
        raise ValueError(f"{name}: got no token in any row; allowed: at least one row with a token")


@overload
def without_empty_rows(dataset: Dataset, name: str) -> Dataset: ...
@overload
def without_empty_rows(dataset: IterableDataset, name: str) -> IterableDataset: ...
def without_empty_rows(dataset: DataSet, name: str) -> DataSet:
    """The data set without the rows that have no token, which are counted in the log; of a stream, as it is read.

    Raises:
        ValueError: no row is left; for a stream, `require_tokens` raises it.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(RowsWith(name, ("input_ids",), "token"))
    if not is_plain(dataset) or (lengths := list_lengths(dataset, "input_ids")) is None:
        return dataset
    return without_rows(dataset, lengths == 0, name, "token")


def _remedy(column: str) -> str:
    return " (rename or drop the column if it holds something else)" if column == "labels" else ""


def _is_column(values: Any, column: str) -> bool:
    if not isinstance(values, Sized) or isinstance(values, str | Mapping):
        return False
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        return False
    return array.ndim == 1 and (not array.size or array.dtype.kind in ("biuf" if column in _MASKS else "iu"))


def _wrong_row(dataset: Dataset, column: str) -> int | None:
    """A row that `check_row` refuses for this column; None if there is none, or if no row has a value."""
    values = arrow_column(dataset, column)
    if column != "input_ids" and values.null_count == len(values):
        return None
    if values.null_count:
        return row_with(dataset, column, null=True)
    lengths, inner = list_lengths(dataset, column), getattr(values.type, "value_type", None)
    if lengths is None or inner is None:
        return 0
    integers = pa.types.is_integer(inner)
    numbers = integers or pa.types.is_floating(inner) or pa.types.is_boolean(inner)
    if not (numbers if column in _MASKS else integers):
        return _first(lengths > 0)
    numbers_of, _ = flat(dataset, column)
    ends = lengths.cumsum()
    if numbers_of.null_count:
        place = numbers_of.is_null().to_numpy(zero_copy_only=False).argmax()
        return int(np.searchsorted(ends, place, side="right"))
    if column == "seq_lengths":
        sums = np.concatenate([[0], numbers_of.to_numpy(zero_copy_only=False).cumsum()])
        lengths = sums[ends] - sums[ends - lengths]
    tokens = list_lengths(dataset, "input_ids")
    return None if tokens is None else _first(lengths != tokens)


def _first(mask: np.ndarray) -> int | None:
    return int(mask.argmax()) if mask.any() else None

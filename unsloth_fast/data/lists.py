"""Columns of lists of numbers, as flat arrays: checks and packing work on a whole data set at once."""

import logging
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from unsloth_ref.checks import counted

logger = logging.getLogger(__name__)


def is_plain(dataset: object) -> TypeGuard[Dataset]:
    """Whether it is a map-style data set whose columns are what its rows hold: one without a transform."""
    return isinstance(dataset, Dataset) and dataset.format["type"] != "custom"


def has_lists(dataset: object, name: str) -> TypeGuard[Dataset]:
    """Whether it is a map-style data set with a column of that name that holds lists of integers."""
    if not isinstance(dataset, Dataset) or name not in dataset.column_names:
        return False
    kind = dataset.data.schema.field(name).type
    return _is_list(kind) and pa.types.is_integer(kind.value_type)


def flat(dataset: Dataset, name: str) -> tuple[pa.Array, np.ndarray]:
    """All values of a column of lists, concatenated, and the length of each list.

    Raises:
        ValueError: the column does not hold a list of numbers or booleans in every row.
    """
    column = arrow_column(dataset, name)
    kind = column.type
    if not _is_list(kind) or not _is_number(kind.value_type):
        raise ValueError(f"dataset: got a column {name} of {kind}; allowed: lists of numbers, one value per token")
    if column.null_count:
        raise ValueError(
            f"dataset: got {counted(column.null_count, 'row')} without {name}; allowed: a list in every row"
        )
    lengths = [_lengths(chunk) for chunk in column.chunks]
    values = pa.chunked_array([chunk.flatten() for chunk in column.chunks], kind.value_type).combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0)
    return values, np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)


def arrow_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """The values of a column, in the order of a selection or shuffle."""
    table: Any = dataset.select_columns([name]).with_format("arrow")[:]
    return table.column(name)


def row_with(dataset: Dataset, name: str, *, null: bool) -> int | None:
    """The first row that has no value in the column, or the first that has one; None if there is none."""
    column = arrow_column(dataset, name)
    if column.null_count == (0 if null else len(column)):
        return None
    return int(np.flatnonzero(column.is_null().to_numpy() == null)[0])


def list_lengths(dataset: Dataset, name: str) -> np.ndarray | None:
    """The length of each list of a column, 0 for a null; None if the column does not hold lists."""
    column = arrow_column(dataset, name)
    if not _is_list(column.type):
        return None
    return np.concatenate([np.empty(0, np.int64), *map(_lengths, column.chunks)]).astype(np.int64)


def without_rows(dataset: Dataset, dropped: np.ndarray, name: str, missing: str) -> Dataset:
    """The data set without some rows, whose number is logged.

    Args:
        dataset: of any columns.
        dropped: [rows] bool.
        name: of the data set, for messages.
        missing: what these rows lack, for messages.

    Raises:
        ValueError: no row is left.
    """
    count = int(dropped.sum())
    if count == 0:
        return dataset
    if count == len(dropped):
        raise ValueError(
            f"{name}: got no {missing} in {counted(count, 'row')}; allowed: at least one row with a {missing}"
        )
    logger.warning("%s: rows without a %s are dropped: %d of %d", name, missing, count, len(dropped))
    return dataset.select(np.flatnonzero(~dropped))


@dataclass
class RowsWith:
    """A filter of a stream: whether a row has something in each column. It logs once that it drops rows.

    Attributes:
        name: of the data set, for messages.
        columns: of lists.
        missing: what the dropped rows lack, for messages.
        logged: whether a row was dropped.
    """

    name: str
    columns: Sequence[str]
    missing: str
    logged: bool = False

    def __call__(self, row: Mapping[str, Sized]) -> bool:
        """Whether the row is kept."""
        kept = all(len(row[column]) for column in self.columns)
        if not kept and not self.logged:
            self.logged = True
            logger.warning("%s: rows without a %s are dropped as they are read", self.name, self.missing)
        return kept


def _lengths(chunk: Any) -> np.ndarray:
    lengths: Any = pc
    return np.nan_to_num(lengths.list_value_length(chunk).to_numpy(zero_copy_only=False))


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)

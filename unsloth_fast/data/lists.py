"""Columns of lists of numbers, as flat arrays: checks and packing work on a whole data set at once."""

from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
from datasets import Dataset


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
    table: Any = dataset.select_columns([name]).with_format("arrow")[:]  # in the order of a selection or shuffle
    column = table.column(name)
    kind = column.type
    if not _is_list(kind) or not _is_number(kind.value_type):
        raise ValueError(f"dataset: got a column {name} of {kind}; allowed: lists of numbers, one value per token")
    if column.null_count:
        raise ValueError(f"dataset: got {column.null_count} rows without {name}; allowed: a list in every row")
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values = pa.chunked_array([chunk.flatten() for chunk in column.chunks], kind.value_type).combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0)
    return values, np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)

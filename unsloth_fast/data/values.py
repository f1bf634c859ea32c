"""Values of columns: of which type they may be, and the message where one is not."""

import reprlib
from collections.abc import Mapping, Sized
from typing import Any

from unsloth_fast.data.lists import is_plain
from unsloth_fast.data.types import Row, Rows

STRING, LIST, DICTIONARY = "a string", "a list", "a dictionary"
EITHER, TOOLS = "a string or a list", "a list, or a string of JSON"


def fits(value: object, allowed: str, *, or_null: bool = False) -> bool:
    """Whether the value is of an allowed type, one of those above.

    Args:
        value: of a column.
        allowed: the types, in words.
        or_null: whether None is allowed, too.
    """
    if value is None:
        return or_null
    if isinstance(value, str):
        return STRING in allowed
    return DICTIONARY in allowed if isinstance(value, Mapping) else isinstance(value, Sized) and LIST in allowed


def check_values(dataset: Rows, name: str, column: str, first: Row, allowed: str) -> None:
    """Raise for a value of another type than allowed; of a stream only the first row is checked.

    Args:
        dataset: with a column of that name.
        name: of the data set, for messages.
        column: which is checked.
        first: the first row of the data set.
        allowed: as in `fits`.

    Raises:
        ValueError: the first such value, and its row.
    """
    rows: Any = [first]
    # A column has one type, that of its first value, except for nulls and where it is JSON of any type.
    if is_plain(dataset) and column in dataset.column_names:
        mixed = type(dataset.features[column]).__name__ == "Json"  # not in every release of datasets
        if mixed or dataset.data.column(column).null_count:
            rows = dataset.select_columns([column]).with_format(None)
    for index, row in enumerate(rows):
        if not fits(row[column], allowed):
            raise wrong_value(name, column, index, row[column], allowed)


def wrong_value(name: str, column: str, row: int, value: object, allowed: str) -> ValueError:
    """The error for a value of another type than allowed."""
    return ValueError(
        f"{name}: got {reprlib.repr(value)} in row {row} of column {column!r}; allowed: {allowed} in every row (drop "
        "the others with the data set's `filter`)"
    )

"""Columns of lists as flat arrays: values and lengths in the order of the rows, or an error that names the column."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets

from tests.data.samples import ids, stream, tokens
from unsloth_fast.data.lists import flat, has_lists


def column(values: list[Any], kind: pa.DataType | None = None) -> Dataset:
    """A data set with the column "x" of this Arrow type."""
    return Dataset(pa.table({"x": pa.array(values, kind)}))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (column([[1, 2], []]), True),
        (column([[1]], pa.large_list(pa.int32())), True),
        (column([None, [1]]), True),
        (column([[1.5]]), False),
        (column([[True]]), False),
        (column([["w1"]]), False),
        (column([[[1]]]), False),
        (column([1, 2]), False),
        (column(["w1"]), False),
        (tokens(2), False),
        (stream(column([[1, 2]])), False),
        ({"x": [[1, 2]]}, False),
        (None, False),
    ],
)
def test_only_a_map_style_column_of_integer_lists_has_lists(dataset: Any, expected: bool) -> None:
    assert has_lists(dataset, "x") == expected


@pytest.mark.parametrize(
    ("dataset", "values", "lengths"),
    [
        (column([[1, 2], [], [3]]), [1, 2, 3], [2, 0, 1]),
        (column([], pa.list_(pa.int64())), [], []),
        (column([[], []], pa.list_(pa.int64())), [], [0, 0]),
        (column([[1, 2], [3]], pa.large_list(pa.int16())), [1, 2, 3], [2, 1]),
        (column([[True, False]]), [True, False], [2]),
        (column([[0.5], [1.5]]), [0.5, 1.5], [1, 1]),
        (column([[1, 2], [3], [4]]).select([2, 0]), [4, 1, 2], [1, 2]),
        (column([[1, 2], [3], [4]]).select(range(1, 3)), [3, 4], [1, 1]),
        (concatenate_datasets([column([[1], [2, 3]]), column([[4]])]), [1, 2, 3, 4], [1, 2, 1]),
    ],
    ids=["lists", "no rows", "empty lists", "large lists", "booleans", "floats", "selection", "slice", "chunks"],
)
def test_values_are_concatenated_in_the_order_of_the_rows(
    dataset: Dataset, values: list[Any], lengths: list[int]
) -> None:
    found, counts = flat(dataset, "x")
    assert found.to_pylist() == values
    assert counts.tolist() == lengths and counts.dtype == np.int64


def test_a_shuffle_changes_the_order() -> None:
    shuffled = ids(*([row] * 2 for row in range(20))).shuffle(seed=1)
    values, lengths = flat(shuffled, "input_ids")
    assert values.to_pylist() == [token for row in shuffled["input_ids"] for token in row] != sorted(values.to_pylist())
    assert lengths.tolist() == [2] * 20


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (column(["w1"]), "dataset: got a column x of string; allowed: lists of numbers, one value per token"),
        (column([1]), "dataset: got a column x of int64; allowed: lists of numbers"),
        (column([["w1"]]), "dataset: got a column x of list<item: string>; allowed: lists of numbers"),
        (column([[[1]]]), "dataset: got a column x of list<item: list<item: int64>>; allowed: lists of numbers"),
        (column([[1], None, None]), "dataset: got 2 rows without x; allowed: a list in every row"),
    ],
)
def test_another_column_is_named(dataset: Dataset, message: str) -> None:
    with pytest.raises(ValueError) as error:
        flat(dataset, "x")
    assert str(error.value).startswith(message)

"""What the functions of this package receive: data sets, their rows, tokenizers and a trainer's keywords."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

Row: TypeAlias = Mapping[str, object]
"""The value of each column in one row."""
TokenRow: TypeAlias = Mapping[str, Sequence[int]]
"""A row of tokens: the integers of each column."""
DataSet: TypeAlias = Dataset | IterableDataset
"""A data set or a stream of the package datasets."""
Rows: TypeAlias = DataSet | Iterable[Row]
"""Rows that are only read: a data set, a stream, or a list of dictionaries."""
ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
"""A tokenizer, or a processor that holds one."""
Keywords: TypeAlias = Mapping[str, object]
"""A trainer's keyword arguments, such as `train_dataset` and `processing_class`."""
Value = TypeVar("Value")
"""The values of keyword arguments that are returned as they were given."""

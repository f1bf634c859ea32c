"""The columns of a data set that are read. All others change nothing, whatever their names mean to a trainer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unsloth_fast.data.choice import CHATS, OF_TOKENS, PAIR, TOKENS, allowed_in, is_conversational, is_empty
from unsloth_fast.data.lists import RowsWith, is_plain, list_lengths, row_with, without_rows
from unsloth_fast.data.types import DataSet, Row
from unsloth_fast.data.values import DICTIONARY, LIST, STRING, fits, wrong_value

logger = logging.getLogger(__name__)

_SHAREGPT = {"from": "role", "value": "content"}  # the keys of a message, and those that TRL knows
OPTIONS = ("tools", "chat_template_kwargs")  # of chat templates
# What TRL or a data collator reads by these names, beside the text.
NAMES = (
    *(*TOKENS, *OF_TOKENS, "attention_mask", "position_ids"),
    *(*PAIR, "chosen", "rejected", *CHATS, *OPTIONS),
)


def read_columns(dataset: DataSet, name: str, columns: tuple[str, ...], text: str, *, named: bool = False) -> DataSet:
    """The data set without the columns that are not read, and without rows that have no message.

    Args:
        dataset: documents, tokenized or not.
        name: of the data set, for messages.
        columns: which are read; those of a stream are checked as they are read.
        text: dataset_text_field, which TRL reads too.
        named: whether the user named it.

    Raises:
        ValueError: no row has a message.
    """
    first: Row = next(iter(dataset))
    names = [column for column in (OF_TOKENS if columns == TOKENS else {*NAMES, text}) if column in first]
    conversational = is_conversational(first, columns)
    kept = (*columns, *(OPTIONS if conversational else ()), *(OF_TOKENS if columns == TOKENS else ()))
    empty = {column for column in names if is_empty(dataset, first, column)}
    unread = {column for column in names if column not in kept}
    if named and text not in first and columns != TOKENS:
        logger.warning("%s: got no column %r, the dataset_text_field; trained on %s", name, text, _quoted(columns))
    elif shown := sorted(unread - empty):
        logger.warning("%s: trained on %s; not read: %s", name, _quoted(columns), ", ".join(map(repr, shown)))
    if is_plain(dataset):  # of a stream, later rows may have a value
        unread |= empty - {*columns}
    if unread:
        dataset = dataset.remove_columns(sorted(unread))
    if columns == TOKENS:
        return dataset
    if not is_plain(dataset):
        options = {"name": name, "columns": columns, "allowed": _allowed(first, columns)}
        dataset = dataset.map(_checked, with_indices=True, fn_kwargs=options)
    elif OPTIONS[1] in dataset.column_names and row_with(dataset, OPTIONS[1], null=True) is not None:
        dataset = dataset.map(_filled)
    return _with_messages(dataset, name, columns) if conversational else dataset


def under_known_name(dataset: DataSet, columns: tuple[str, ...]) -> tuple[DataSet, tuple[str, ...]]:
    """The data set and its columns, with conversations as TRL knows them.

    That is with the keys role and content instead of ShareGPT's from and value, and not in "conversations".
    """
    row: Row = next(iter(dataset))
    messages = [row[column][0] for column in columns]
    if any(isinstance(message, Mapping) and message.keys() >= {*_SHAREGPT} for message in messages):
        dataset = dataset.map(_with_standard_keys, fn_kwargs={"columns": columns})
    if columns != (CHATS[1],):
        return dataset, columns
    return dataset.rename_column(CHATS[1], CHATS[0]), (CHATS[0],)


def _with_standard_keys(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """The conversations of a row with standard keys; those that were given do not change."""
    return {
        column: [{_SHAREGPT.get(key, key): value for key, value in message.items()} for message in row[column]]
        for column in columns
    }


def _quoted(columns: Sequence[str]) -> str:
    return " and ".join(map(repr, columns))


def _allowed(first: Row, columns: tuple[str, ...]) -> str:
    """The values that a row may hold, decided by the first one: a prompt and its completion have one type."""
    return (LIST if is_conversational(first, columns) else STRING) if columns == PAIR else allowed_in(columns)


def _with_messages(dataset: DataSet, name: str, columns: Sequence[str]) -> DataSet:
    """The rows that have a message in each column; TRL reads the first message of each."""
    if not is_plain(dataset):
        dataset = dataset.filter(RowsWith(name, columns, "message"))
        if next(iter(dataset), None) is None:
            raise ValueError(f"{name}: got no message in any row; allowed: at least one row with a message")
        return dataset
    lengths = [list_lengths(dataset, column) for column in columns]
    empty = np.logical_or.reduce([own == 0 for own in lengths if own is not None] or [np.zeros(len(dataset), bool)])
    return without_rows(dataset, empty, name, "message")


def _checked(row: dict[str, Any], index: int, name: str, columns: Sequence[str], allowed: str) -> dict[str, Any]:
    for column in columns:
        if not fits(row.get(column), allowed):
            raise wrong_value(name, column, index, row.get(column), allowed)
    options = OPTIONS[1]
    if not fits(row.get(options), DICTIONARY, or_null=True):
        raise wrong_value(name, options, index, row[options], DICTIONARY)
    return _filled(row)


def _filled(row: Row) -> dict[str, Any]:
    """No variables of the chat template instead of null, which TRL cannot unpack."""
    return {OPTIONS[1]: row.get(OPTIONS[1]) or {}} if OPTIONS[1] in row else {}

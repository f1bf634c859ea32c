"""The columns of a data set that are read. All others change nothing, whatever their names mean to a trainer."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unsloth_fast.data.lists import RowsWith, is_plain, list_lengths, row_with, without_rows
from unsloth_fast.data.values import DICTIONARY, fits, wrong_value

logger = logging.getLogger(__name__)

TOKENS = ("input_ids",)
OPTIONS = ("tools", "chat_template_kwargs")  # of chat templates
_OF_TOKENS = ("labels", "completion_mask", "assistant_masks", "seq_lengths")
# What TRL or a data collator reads by these names, beside the text.
_NAMES = (
    *(*TOKENS, *_OF_TOKENS, "attention_mask", "position_ids"),
    *("prompt", "completion", "chosen", "rejected", "messages", "conversations", *OPTIONS),
)
_HIDDEN = "unread_"


def is_empty(dataset: Any, first: Mapping[str, Any], name: str) -> bool:
    """Whether no row has a value in the column; of a stream, whether the first row has none."""
    if first.get(name) is not None:
        return False
    if not is_plain(dataset) or name not in dataset.column_names:
        return True
    return row_with(dataset, name, null=False) is None


def is_conversational(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """Whether these columns of a row hold messages."""
    return tuple(columns) != TOKENS and not isinstance(row[columns[0]], str)


def read_columns(dataset: Any, name: str, columns: tuple[str, ...], allowed: str, text: str) -> Any:
    """The data set without the columns that are not read, and without rows that have no message.

    Args:
        dataset: documents, tokenized or not.
        name: of the data set, for messages.
        columns: which are read.
        allowed: what each of their rows may hold; a stream is checked as it is read.
        text: dataset_text_field, which TRL reads too.

    Raises:
        ValueError: no row has a message.
    """
    first: Mapping[str, Any] = next(iter(dataset))
    names = [column for column in (_OF_TOKENS if columns == TOKENS else {*_NAMES, text}) if column in first]
    conversational = is_conversational(first, columns)
    kept = (*columns, *(OPTIONS if conversational else ()), *(_OF_TOKENS if columns == TOKENS else ()))
    empty = {column for column in names if is_empty(dataset, first, column)}
    unread = {column for column in names if column not in kept}
    if shown := sorted(unread - empty):
        logger.warning(
            "%s: trained on %s; not read: %s",
            *(name, " and ".join(map(repr, columns)), ", ".join(map(repr, shown))),
        )
    if is_plain(dataset):  # of a stream, later rows may have a value
        unread |= empty - {*columns}
    if unread:
        dataset = dataset.remove_columns(sorted(unread))
    if columns == TOKENS:
        return dataset
    if not is_plain(dataset):
        options = {"name": name, "columns": columns, "allowed": allowed}
        dataset = dataset.map(_checked, with_indices=True, fn_kwargs=options)
    elif OPTIONS[1] in dataset.column_names and row_with(dataset, OPTIONS[1], null=True) is not None:
        dataset = dataset.map(_filled)
    return _with_messages(dataset, name, columns) if conversational else dataset


def _with_messages(dataset: Any, name: str, columns: Sequence[str]) -> Any:
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


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """No variables of the chat template instead of null, which TRL cannot unpack."""
    return {OPTIONS[1]: row.get(OPTIONS[1]) or {}} if OPTIONS[1] in row else {}


@dataclass(frozen=True)
class FormattingOfHidden:
    """A user's formatting_func for rows whose columns `hide_columns` renamed.

    Attributes:
        function: the user's function, of a row or of a batch.
    """

    function: Callable[[Any], Any]

    def __call__(self, rows: Mapping[str, Any]) -> Any:
        """What the function returns for these rows, under their own names."""
        return self.function({name.removeprefix(_HIDDEN): value for name, value in rows.items()})


def hide_columns(dataset: Any, function: Callable[[Any], Any]) -> tuple[Any, Callable[[Any], Any], list[str]]:
    """Rename the columns that only a user's formatting_func reads, and that TRL would read by their names.

    Returns:
        The data set, the function for it, and the new names.
    """
    names = [name for name in next(iter(dataset), ()) if name in _NAMES]
    if not names:
        return dataset, function, []
    renamed = {name: f"{_HIDDEN}{name}" for name in names}
    return dataset.rename_columns(renamed), FormattingOfHidden(function), list(renamed.values())

"""A user's formatting_func: of a row or of a batch of rows, returning a string or a list of strings."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jinja2 import TemplateError

from unsloth_fast.config import DEFAULT_TEXT
from unsloth_fast.data.types import Row

# What a function of a batch raises for a row, and a function of a row for a batch.
_OTHER_SHAPE = (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError, TemplateError)

Formatter: TypeAlias = Callable[[dict[str, object]], object]
"""A user's function, which is called with a row or with a batch: a dictionary from columns to values."""


@dataclass(frozen=True)
class Formatting:
    """The text of a row, made by a user's function.

    Attributes:
        function: the user's function.
        batched: whether it takes a batch, a dictionary of lists, instead of a row.
        field: the key of the texts, where it returns a dictionary without "text".
    """

    function: Formatter
    batched: bool
    field: str

    def __call__(self, row: Row) -> str:
        """The text of a row.

        Raises:
            ValueError: the function returned anything but one text.
        """
        given: dict[str, object] = {name: [value] for name, value in row.items()} if self.batched else dict(row)
        made = self.function(given)
        text = _text_in(made, self.field)
        if isinstance(text, list) and len(text) == 1:
            text = text[0]
        if not isinstance(text, str):
            raise ValueError(_refusal(made))
        return text


def formatting_of(function: Formatter, rows: Sequence[Row], field: str) -> Formatting:
    """Find out whether a user's function takes a row or a batch, by calling it with both.

    Args:
        function: the user's function.
        rows: the first one or two rows of the data set.
        field: dataset_text_field.

    Raises:
        ValueError: it returns anything but one text for each row.
    """
    try:
        alone = _text_in(function(dict(rows[0])), field)
        error = None
    except _OTHER_SHAPE as raised:
        alone, error = None, raised
    if isinstance(alone, str):  # a function of a batch returns a list, of its letters where it is given a row
        return Formatting(function, False, field)
    one = isinstance(alone, list) and len(alone) == 1 and isinstance(alone[0], str)
    two = [*rows, *rows][:2]
    try:
        made = function({name: [row.get(name) for row in two] for name in two[0]})
    except _OTHER_SHAPE as raised:
        if one:
            return Formatting(function, False, field)
        if error is None:
            raise ValueError(_refusal(alone)) from raised
        raise raised from error
    texts = _text_in(made, field)
    if isinstance(texts, list) and len(texts) == 2 and all(isinstance(text, str) for text in texts):
        return Formatting(function, True, field)
    if one:
        return Formatting(function, False, field)
    raise ValueError(_refusal(made if alone is None else alone))


def _text_in(made: Any, field: str) -> Any:
    """The texts that the function returned, taken out of a dictionary; a tuple becomes a list."""
    if isinstance(made, Mapping):
        made = made.get(DEFAULT_TEXT, made.get(field))
    return list(made) if isinstance(made, tuple) else made


def _refusal(made: Any) -> str:
    return (
        f"formatting_func: got {reprlib.repr(made)}; allowed: a function of a row that returns a string, or of a batch "
        f"that returns a list of strings, one per row, both also as {{{DEFAULT_TEXT!r}: ...}}"
    )

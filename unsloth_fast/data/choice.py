"""Which columns of a data set are trained on, where it has several that could be."""

from collections.abc import Iterator

from transformers import TrainingArguments
from trl import SFTConfig

from unsloth_fast.config import DEFAULT_TEXT
from unsloth_fast.data.lists import is_plain, row_with
from unsloth_fast.data.types import Keywords, Row, Rows
from unsloth_fast.data.values import EITHER, LIST, STRING, fits

TOKENS = ("input_ids",)
PAIR = ("prompt", "completion")
CHATS = ("messages", "conversations")
OF_TOKENS = ("labels", "completion_mask", "assistant_masks", "seq_lengths")


def names_text_field(args: TrainingArguments | None, keywords: Keywords) -> bool:
    """Whether the user named dataset_text_field, as far as that is known: "text" in a `trl.SFTConfig` is its default.

    Args:
        args: the arguments as the user gave them; in those of a run the field has a value.
        keywords: the fields of the arguments that the trainer received as keywords.
    """
    named = getattr(args, "names_text_field", False)  # of UnslothTrainingArguments
    return (
        "dataset_text_field" in keywords or named or getattr(args, "dataset_text_field", DEFAULT_TEXT) != DEFAULT_TEXT
    )


def trained_columns(dataset: Rows, row: Row, args: SFTConfig, *, named: bool) -> tuple[str, ...]:
    """The columns that are trained on; () if the data set has none of them.

    Tokens come first. A text in `dataset_text_field` comes before conversations, and before a prompt and a completion
    if the user named the field. It comes last if assistant_only_loss or completion_only_loss requires other columns
    that the data set has. A column without any value counts as absent, and so does one of another type, unless nothing
    else is left.

    Args:
        dataset: a data set or a stream, of which only the first row is known.
        row: the first row.
        args: the run's arguments.
        named: as in `names_text_field`.
    """
    present = [columns for columns in _in_order(row, args, named=named) if row.keys() >= set(columns)]
    for columns in present:
        allowed = allowed_in(columns)
        if all(fits(row[name], allowed) or _has_nulls(dataset, row, name) for name in columns):
            return columns
    return present[0] if present else ()


def _in_order(row: Row, args: SFTConfig, *, named: bool) -> Iterator[tuple[str, ...]]:
    text, chats = (args.dataset_text_field,), [(name,) for name in CHATS]
    pair = row.keys() >= set(PAIR)
    chat = any(isinstance(row.get(name), list) for name in CHATS)
    required = (args.assistant_only_loss and (pair or chat)) or (args.completion_only_loss and pair)
    yield TOKENS
    if not required and (named or not pair):
        yield text
    yield PAIR
    yield from chats
    yield text


def allowed_in(columns: tuple[str, ...]) -> str:
    """The values that a row of these columns may hold, as in `values.fits`."""
    return EITHER if columns == PAIR else LIST if columns == TOKENS or columns[0] in CHATS else STRING


def is_empty(dataset: Rows, first: Row, name: str) -> bool:
    """Whether no row has a value in the column; of a stream, whether the first row has none."""
    if first.get(name) is not None:
        return False
    if not is_plain(dataset) or name not in dataset.column_names:
        return True
    return row_with(dataset, name, null=False) is None


def is_conversational(row: Row, columns: tuple[str, ...]) -> bool:
    """Whether these columns of a row hold messages."""
    return columns not in ((), TOKENS) and not isinstance(row[columns[0]], str)


def _has_nulls(dataset: Rows, first: Row, column: str) -> bool:
    """Whether the first row is null and another is not."""
    return first[column] is None and not is_empty(dataset, first, column)

"""Which columns of a data set are trained on, where it has several that could be."""

import logging
from collections.abc import Mapping
from typing import Any

from trl import SFTConfig

from unsloth_fast.config import DEFAULT_TEXT

logger = logging.getLogger(__name__)

PAIR = ("prompt", "completion")
CHATS = ("messages", "conversations")
OF_TOKENS = ("labels", "completion_mask", "assistant_masks", "attention_mask", "position_ids", "seq_lengths")


def names_text_field(args: SFTConfig, keywords: Mapping[str, Any]) -> bool:
    """Whether the user named dataset_text_field, as far as that is known: "text" in a `trl.SFTConfig` is its default.

    Args:
        args: the run's arguments.
        keywords: the fields of the arguments that the trainer received as keywords.
    """
    named = getattr(args, "names_text_field", False)  # of UnslothTrainingArguments
    return "dataset_text_field" in keywords or named or args.dataset_text_field != DEFAULT_TEXT


def trained_columns(row: Mapping[str, Any], args: SFTConfig, *, named: bool) -> tuple[str, ...]:
    """The columns that are trained on, by the first row of a data set; () if it has none of them.

    Tokens come first. A text in `dataset_text_field` comes before conversations, and before a prompt and a completion
    if the user named the field. It comes last if assistant_only_loss or completion_only_loss requires other columns
    that the row has.

    Args:
        row: the first row.
        args: the run's arguments.
        named: as in `names_text_field`.
    """
    text = args.dataset_text_field
    pair = PAIR if row.keys() >= set(PAIR) else ()
    chats = [(name,) for name in CHATS if isinstance(row.get(name), list)]
    if "input_ids" in row:
        return ("input_ids",)
    others = bool(pair or chats)
    required = (args.assistant_only_loss and others) or (args.completion_only_loss and pair)
    if isinstance(row.get(text), str) and not required and (named or not pair):
        return (text,)
    present = [(name,) for name in (*CHATS, text) if name in row]
    return next(iter([*([pair] if pair else []), *chats, *present]), ())


def is_conversational(row: Mapping[str, Any], columns: tuple[str, ...]) -> bool:
    """Whether these columns of a row hold messages."""
    return bool(columns) and columns != ("input_ids",) and all(isinstance(row[name], list) for name in columns)


def log_choice(row: Mapping[str, Any], columns: tuple[str, ...], name: str, args: SFTConfig, *, named: bool) -> None:
    """Log which columns are trained on, where the row has others or lacks the field that was named."""
    text = args.dataset_text_field
    trained = " and ".join(map(repr, columns))
    others = [other for other in (*PAIR, *CHATS, *OF_TOKENS, text) if row.get(other) is not None]
    others = [other for other in others if other not in columns]
    if named and text not in row:
        logger.warning("%s: got no column %r, the dataset_text_field; trained on %s", name, text, trained)
    elif others:
        logger.warning("%s: trained on %s, not on %s", name, trained, ", ".join(map(repr, others)))

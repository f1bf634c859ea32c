"""Texts to tokens: of a text column, a prompt with its completion, or a user's formatting_func.

TRL adds the end token to every text that does not end with it, and the tokenizer adds its begin token to every text.
A text that a chat template wrote has both already: its tokens are those of the text itself.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTConfig

from unsloth_fast.config import DEFAULT_TEXT
from unsloth_fast.data.choice import TOKENS, is_conversational, trained_columns
from unsloth_fast.data.columns import check_text, datasets_of, has_media_columns
from unsloth_fast.data.formatting import Formatter, Formatting, formatting_of
from unsloth_fast.data.lists import is_plain
from unsloth_fast.data.nulls import renderer
from unsloth_fast.data.reading import NAMES, read_columns, under_known_name
from unsloth_fast.data.turns import ends_of_turns
from unsloth_fast.data.types import DataSet, Keywords, ProcessingClass, Row

logger = logging.getLogger(__name__)

_COUNTED = ("_begun", "_ended", "_merged")  # columns of a data set until they are counted


class Readable(NamedTuple):
    """What TRL's preparation receives.

    Attributes:
        dataset: with tokens, or with conversations.
        processing_class: the tokenizer or processor for conversations.
        formatting_func: None where it was used here.
        columns: which were trained on; () with a formatting_func.
    """

    dataset: DataSet
    processing_class: ProcessingClass
    formatting_func: Any
    columns: tuple[str, ...]


def read_texts(
    dataset: DataSet,
    name: str,
    args: SFTConfig,
    processing_class: ProcessingClass,
    formatting_func: Formatter | None = None,
    *,
    named: bool = False,
) -> Readable:
    """Tokenize the texts of a data set; leave conversations to TRL, without the nulls that Arrow adds.

    Args:
        dataset: a data set or a stream. One with tokens or images is left as it is.
        name: of the data set, for messages.
        args: the run's arguments.
        processing_class: the tokenizer or processor.
        formatting_func: the user's function that makes texts of rows.
        named: as in `names_text_field`.

    Raises:
        ValueError: as in `check_text`; a formatting_func that returns no texts; a tokenizer without an end token, or
            without a chat template where it is needed.
    """
    first: Any = next(iter(dataset), None)
    columns: tuple[str, ...] = ()
    if first is not None and (formatting_func is None or TOKENS[0] in first):
        columns = check_text(dataset, name, first, args, named=named)
        dataset = read_columns(dataset, name, columns, args.dataset_text_field, named=named)
        first = next(iter(dataset))
    unchanged = Readable(dataset, processing_class, formatting_func, columns)
    transformed = isinstance(dataset, Dataset) and not is_plain(dataset)
    if first is None or transformed or columns == TOKENS or has_media_columns({"train_dataset": dataset}):
        return unchanged
    formatting = None
    if formatting_func is not None:
        rows: list[Any] = list(islice(dataset, 2))
        formatting = formatting_of(formatting_func, rows, args.dataset_text_field)
    check_processing_class(processing_class, first, columns, args, formatted=formatting is not None)
    if formatting is None and is_conversational(first, columns):
        dataset, read = under_known_name(dataset, columns)
        return Readable(dataset, renderer(processing_class, dataset, name, read), None, columns)
    tokens = _tokens(processing_class, columns or (DEFAULT_TEXT,), formatting, first, name)
    return Readable(_tokenized(dataset, name, args, tokens, first), processing_class, None, columns)


def check_processing_classes(given: Keywords, args: SFTConfig, *, named: bool) -> None:
    """Check the tokenizer of a trainer for all its data sets, before they are prepared.

    Args:
        given: the trainer's keywords.
        args: the run's arguments.
        named: as in `names_text_field`.

    Raises:
        ValueError: as in `check_processing_class`.
    """
    processing_class: Any = given.get("processing_class")
    options: Any = args.dataset_kwargs or {}
    if processing_class is None or has_media_columns(given) or options.get("skip_prepare_dataset", False):
        return
    for _, dataset in datasets_of(given):
        first: Any = next(iter(dataset))
        columns = trained_columns(dataset, first, args, named=named)
        formatted = given.get("formatting_func") is not None and columns != TOKENS
        check_processing_class(processing_class, first, columns, args, formatted=formatted)


def check_processing_class(
    processing_class: ProcessingClass, row: Row, columns: tuple[str, ...], args: SFTConfig, *, formatted: bool
) -> None:
    """Refuse a tokenizer without an end token for texts, and one without a chat template for conversations.

    Args:
        processing_class: the tokenizer or processor.
        row: the first row of the data set.
        columns: which of its columns are trained on.
        args: the run's arguments.
        formatted: whether a formatting_func makes its texts.

    Raises:
        ValueError: what is missing, and how to set it.
    """
    if formatted or (columns != TOKENS and not is_conversational(row, columns)):
        if not (getattr(args, "eos_token", None) or _inner(processing_class).eos_token):
            raise ValueError(
                "processing_class: got a tokenizer without eos_token; allowed: one with it, as it ends every text "
                "(set the tokenizer's `eos_token`)"
            )
    elif is_conversational(row, columns):
        tokenizer = _inner(processing_class)
        needs_one = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        has_one = any(getattr(one, "chat_template", None) for one in (processing_class, tokenizer))
        if needs_one and not has_one and not args.chat_template_path:
            raise ValueError(
                f"processing_class: got a tokenizer without chat_template for the conversations in "
                f"{' and '.join(map(repr, columns))}; allowed: one with a template (set one with "
                "`unsloth_fast.chat_templates.get_chat_template`, or name one in chat_template_path)"
            )


def _inner(processing_class: ProcessingClass) -> Any:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


@dataclass(frozen=True)
class TextTokens:
    """The tokens of a batch of rows, for `Dataset.map`.

    Attributes:
        tokenizer: the tokenizer.
        columns: the column of the text, or those of a prompt and its completion.
        formatting: makes the text of a row; None to take it from its column.
        before: the tokens that the tokenizer adds before a text.
        after: those that it adds behind a text.
        begin: the text of `before`.
        ends: what ends a text, besides the end token: ends of the turns of the chat template.
        name: of the data set, for messages.
        counted: whether to add the columns `_COUNTED`.
    """

    tokenizer: Any
    columns: tuple[str, ...]
    formatting: Formatting | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    begin: str
    ends: tuple[str, ...]
    name: str
    counted: bool = True

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """The tokens, the mask of completions, and what is counted in the log."""
        parts = self._parts(rows)
        *prompts, last = parts
        ended = [self._ends(text) for text in last]
        eos = self.tokenizer.eos_token
        last = [text if text.endswith(eos) or end else text + eos for text, end in zip(last, ended, strict=True)]
        texts = list(map("".join, zip(*prompts, last, strict=True)))
        begun = [bool(self.before) and text.lstrip().startswith(self.begin) for text in texts]
        plain = self.tokenizer(text=texts, add_special_tokens=False)["input_ids"]
        made: dict[str, list[Any]] = {"input_ids": []}
        for ids, written, end, text in zip(plain, begun, ended, last, strict=True):
            after = () if end or text.endswith(eos) else self.after
            made["input_ids"].append([*(() if written else self.before), *ids, *after])
        merged = [False] * len(texts)
        if prompts:
            asked = self.tokenizer(text=prompts[0], add_special_tokens=False)["input_ids"]
            made["completion_mask"] = []
            for index, (ids, whole) in enumerate(zip(asked, plain, strict=True)):
                # Tokens may merge across the boundary: a completion starts where both differ, as with TRL.
                common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, whole, strict=False)))
                merged[index] = common < len(ids)
                masked = common + (0 if begun[index] else len(self.before))
                made["completion_mask"].append([0] * masked + [1] * (len(made["input_ids"][index]) - masked))
        elif self.formatting is not None:
            made[DEFAULT_TEXT] = texts
        return made | (dict(zip(_COUNTED, (begun, ended, merged), strict=True)) if self.counted else {})

    def _parts(self, rows: Mapping[str, list[Any]]) -> list[list[str]]:
        """The texts of each column; or the texts that the user's function makes."""
        if self.formatting is not None:
            size = len(next(iter(rows.values())))
            return [[self.formatting({name: rows[name][index] for name in rows}) for index in range(size)]]
        return [list(rows[column]) for column in self.columns]

    def _ends(self, text: str) -> bool:
        """Whether a text ends a turn, with or without whitespace behind it, and not just with the end token."""
        stripped, eos = text.rstrip(), self.tokenizer.eos_token
        return not text.endswith(eos) and stripped.endswith((eos, *self.ends))


def _tokens(
    processing_class: ProcessingClass, columns: tuple[str, ...], formatting: Formatting | None, row: Row, name: str
) -> TextTokens:
    tokenizer = _inner(processing_class)
    sample: Any = row[columns[0]] if formatting is None else formatting(row)
    before, after = _added_tokens(tokenizer, sample)
    begin = "".join(tokenizer.convert_ids_to_tokens(list(before)))
    return TextTokens(tokenizer, columns, formatting, before, after, begin, ends_of_turns(processing_class), name)


def _added_tokens(tokenizer: Any, sample: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a tokenizer adds before a text and behind it, from how it reads a sample."""
    plain, whole = (tokenizer(text=sample or "a", add_special_tokens=added)["input_ids"] for added in (False, True))
    count = len(whole) - len(plain)
    # A sample may itself begin with the tokens: the last place at which it is found follows all that are added before.
    places = (index for index in range(count + 1) if whole[index : index + len(plain)] == plain)
    start = max(places, default=count)
    return tuple(whole[:start]), tuple(whole[start + len(plain) :])


def _tokenized(dataset: DataSet, name: str, args: SFTConfig, tokens: TextTokens, first: Row) -> Any:
    """The data set with its tokens; what was found in its texts is logged."""
    # They do not belong to the tokens of this text.
    unread = [column for column in NAMES if column in first and column not in tokens.columns]
    if not isinstance(dataset, Dataset):
        found = tokens({column: [value] for column, value in first.items()})
        _report(tokens, {column: sum(found[column]) for column in _COUNTED}, None)
        uncounted = replace(tokens, counted=False)
        return dataset.map(uncounted, batched=True, batch_size=1, remove_columns=unread)
    with args.main_process_first(desc=f"tokenizing {name}"):
        options: dict[str, Any] = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {name}"}
        rows = dataset.with_format(None).map(tokens, batched=True, remove_columns=unread, **options)
    counts = {column: int(rows.data.column(column).to_numpy().sum()) for column in _COUNTED}
    _report(tokens, counts, len(rows))
    return rows.remove_columns(list(_COUNTED))


def _report(tokens: TextTokens, counts: Mapping[str, int], rows: int | None) -> None:
    """Log what was found; of a stream, whose rows are not counted, in its first text."""
    spans = {name: f"{count} of {rows} texts" if rows else "texts of the stream" for name, count in counts.items()}
    eos = tokens.tokenizer.eos_token
    if counts["_begun"]:
        logger.warning(
            "%s: the tokenizer's begin token is not added to %s that begin with %r",
            *(tokens.name, spans["_begun"], tokens.begin),
        )
    if counts["_ended"]:
        logger.warning(
            "%s: eos_token %r is not added to %s that end with the end of a turn, %r",
            *(tokens.name, eos, spans["_ended"], tokens.ends[0] if tokens.ends else eos),
        )
    if counts["_merged"]:
        logger.warning(
            "%s: the last token of the prompt merges with the completion in %s; such a completion begins with the "
            "merged token (end prompts where a token ends)",
            *(tokens.name, spans["_merged"]),
        )

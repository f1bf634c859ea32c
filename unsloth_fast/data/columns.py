"""The columns of a trainer's data sets: which of them are trained on, and errors for data sets without such columns."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig

from unsloth_fast.data.choice import PAIR, TOKENS, allowed_in, is_conversational, is_empty, trained_columns
from unsloth_fast.data.labels import require_targets, require_targets_in_stream
from unsloth_fast.data.lists import has_lists, is_plain, row_with
from unsloth_fast.data.reading import OPTIONS, read_columns, under_known_name
from unsloth_fast.data.streams import picklable
from unsloth_fast.data.tokens import check_tokens, check_tokens_while_reading, require_tokens, without_empty_rows
from unsloth_fast.data.types import DataSet, Keywords, Row, Rows, Value
from unsloth_fast.data.values import DICTIONARY, LIST, STRING, TOOLS, check_values, fits, wrong_value
from unsloth_fast.data.vocabulary import check_vocabulary, check_while_reading

_IMAGES = ("image", "images")  # by which TRL recognises data sets of images
_MEDIA = frozenset(
    (
        *("image", "images", "image_sizes", "image_grid_thw", "pixel_values", "pixel_values_videos", "video", "videos"),
        *("pixel_attention_mask", "video_grid_thw", "mm_token_type_ids", "audio", "audios"),
    )
)


def datasets_of(given: Keywords) -> Iterator[tuple[str, Rows]]:
    """The name and the value of each data set among a trainer's keywords, also of each entry of a dictionary."""
    for name in ("train_dataset", "eval_dataset"):
        data: Any = given.get(name)
        if isinstance(data, dict):
            yield from ((f"{name}[{key!r}]", part) for key, part in data.items())
        elif data is not None:
            yield name, data


def has_stream(given: Keywords) -> bool:
    """Whether one of the trainer's data sets is a stream, which can only be read from its start."""
    return any(isinstance(dataset, IterableDataset) for _, dataset in datasets_of(given))


def has_media_columns(given: Keywords) -> bool:
    """Whether one of the trainer's data sets has a column of images, video or audio."""
    return any(_MEDIA.intersection(_columns(dataset)) for _, dataset in datasets_of(given))


def completion_only(given: Keywords, args: SFTConfig, *, named: bool = False) -> bool:
    """Whether only completions are trained on, as TRL decides it from the first row."""
    if args.completion_only_loss is not None:
        return args.completion_only_loss
    data: Any = given.get("train_dataset")
    if data is None:
        return False
    first: Row = next(iter(data))
    return first.keys() >= set(PAIR) and trained_columns(data, first, args, named=named) != (args.dataset_text_field,)


def check_columns(
    given: Keywords, args: SFTConfig, vocabulary: int | None, *, named: bool = False, images: bool = True
) -> None:
    """Refuse, before any work is done, a data set that is empty or has no column to train on.

    Args:
        given: the trainer's keywords.
        args: the run's arguments.
        vocabulary: as in `check_vocabulary`; used here where skip_prepare_dataset leaves no later chance to check.
        named: as in `names_text_field`.
        images: whether the rows may hold images, video or audio, which TRL then checks.

    Raises:
        ValueError: which data set, what was found, and what is allowed.
    """
    for name, dataset in datasets_of(given):
        first: Any = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name}: got no row; allowed: at least one (check its path, split and filters)")
        if not images and (found := [column for column in _IMAGES if column in first]):
            raise ValueError(
                f"{name}: got the column {found[0]!r} for a model or a tokenizer of text alone; allowed: columns of "
                "text (drop it with the data set's `remove_columns`)"
            )
        media = images and bool(_MEDIA & first.keys())
        if _skips_preparation(args):
            collated = media or given.get("data_collator") is not None
            _check_prepared(dataset, name, first, vocabulary, collated=collated)
        elif not media and (given.get("formatting_func") is None or TOKENS[0] in first):
            check_text(dataset, name, first, args, named=named)


def prepared_rows(given: Mapping[str, Value], args: SFTConfig) -> dict[str, Value]:
    """The trainer's keywords; where it takes the rows of its data sets as they are, those without a token are dropped.

    A stream is also checked as it is read. A user's data collator receives all rows.

    Raises:
        ValueError: a data set has no row with a token.
    """
    if not _skips_preparation(args):
        return dict(given)
    rows = _as_they_are if given.get("data_collator") is not None else _without_empty_rows
    return _with_each(given, lambda dataset, name: picklable(rows(dataset, name)))


def with_rows(given: Mapping[str, Value], args: SFTConfig) -> dict[str, Value]:
    """The trainer's keywords, whose data sets give rows as dictionaries, and conversations as lists, in any format.

    Raises:
        TypeError: what is no data set, or several data sets to train on.
    """
    if isinstance(train := given.get("train_dataset"), dict):
        names = ", ".join(map(repr, train))
        raise TypeError(
            f"train_dataset: got a {type(train).__name__} of {names}; allowed: one of them, as `train_dataset` must be "
            "a `Dataset` or `IterableDataset`"
        )
    # Rows that are left as they are may come from anything with rows.
    others = (torch.utils.data.Dataset, list) if _skips_preparation(args) else ()
    return _with_each(given, partial(_with_rows, kinds=(Dataset, IterableDataset, *others)))


def _with_rows(dataset: DataSet, name: str, kinds: tuple[type, ...]) -> Any:
    if not isinstance(dataset, kinds):
        seen = repr(dataset) if isinstance(dataset, str | PathLike) else type(dataset).__name__
        raise TypeError(
            f"{name}: got {seen}; allowed: a `Dataset` or `IterableDataset` of the package datasets, whose "
            "`load_dataset` reads files"
        )
    if _is_readable(first := next(iter(dataset), {})):
        return dataset
    if is_plain(dataset):
        if not dataset.format["output_all_columns"]:
            dataset = dataset.select_columns(dataset.format["columns"])
        return dataset.with_format(None)
    if isinstance(dataset, IterableDataset) and _is_readable(next(iter(plain := dataset.with_format(None)))):
        return plain
    if isinstance(first, Mapping):
        return dataset
    raise TypeError(f"{name}: got rows of the type {type(first).__name__}; allowed: dictionaries")


def _is_readable(row: Any) -> bool:
    """Whether it is a dictionary, of tokens in any format, or of values that are not arrays."""
    is_row = isinstance(row, Mapping)
    return is_row and (TOKENS[0] in row or not any(isinstance(value, np.ndarray) for value in row.values()))


def with_messages(
    given: Mapping[str, Value], args: SFTConfig, *, named: bool = False, images: bool = True
) -> dict[str, Value]:
    """The trainer's keywords; with assistant_only_loss, data sets of conversations as TRL's constructor expects them.

    It tests the first row before it prepares the data sets: for a message, and under the names that it knows.

    Args:
        given: the trainer's keywords.
        args: the run's arguments.
        named: as in `names_text_field`.
        images: as in `check_columns`.

    Raises:
        ValueError: no row has a message.
    """
    if not args.assistant_only_loss or _skips_preparation(args) or given.get("formatting_func") is not None:
        return dict(given)

    def as_messages(dataset: DataSet, name: str) -> Any:
        first = next(iter(dataset))
        columns = trained_columns(dataset, first, args, named=named)
        transformed = isinstance(dataset, Dataset) and not is_plain(dataset)
        if transformed or not is_conversational(first, columns) or (images and _MEDIA & first.keys()):
            return dataset
        return under_known_name(read_columns(dataset, name, columns, args.dataset_text_field), columns)[0]

    return _with_each(given, as_messages)


def without_empty_media(given: Mapping[str, Value]) -> dict[str, Value]:
    """The trainer's keywords; of their data sets columns of images, video or audio without any value are taken out."""
    return _with_each(given, _without_empty_media)


def _without_empty_media(dataset: DataSet, name: str) -> Any:
    if not is_plain(dataset) or not len(dataset):
        return dataset
    empty = [column for column in dataset.column_names if column in _MEDIA and is_empty(dataset, dataset[0], column)]
    return dataset.remove_columns(empty) if empty else dataset


def _with_each(given: Mapping[str, Value], changed: Callable[[Any, str], Any]) -> dict[str, Value]:
    """The trainer's keywords with each data set replaced by what the function of it and its name returns."""
    found = {name: changed(dataset, name) for name, dataset in datasets_of(given)}
    for name in ("train_dataset", "eval_dataset"):
        if isinstance(data := given.get(name), dict):
            found[name] = {key: found.pop(f"{name}[{key!r}]") for key in data}
    return dict(given) | found


def _as_they_are(dataset: DataSet, name: str) -> Any:
    return dataset


def _without_empty_rows(dataset: DataSet, name: str) -> DataSet:
    first = next(iter(dataset))
    if TOKENS[0] not in first:
        return dataset
    if isinstance(dataset, IterableDataset):
        stream = without_empty_rows(check_tokens_while_reading(dataset, name), name)
        require_tokens(stream, name)
        return stream
    return without_empty_rows(read_columns(dataset, name, TOKENS, TOKENS[0]), name)


def _check_prepared(dataset: Rows, name: str, first: Row, vocabulary: int | None, *, collated: bool) -> None:
    """Check tokens and labels that the trainer takes as they are; any columns if another collator makes the tokens."""
    if not collated:
        if TOKENS[0] not in first:
            raise ValueError(
                f"{name}: got no column 'input_ids', only {', '.join(map(repr, first))}; allowed: rows with "
                "'input_ids', as skip_prepare_dataset leaves them as they are"
            )
        check_tokens(dataset, name, first)
    check_vocabulary(dataset, name, vocabulary)
    if has_lists(dataset, "labels"):
        require_targets(dataset, name)
    elif isinstance(dataset, IterableDataset) and isinstance(first.get("labels"), Sized):
        require_targets_in_stream(check_while_reading(dataset, name, vocabulary), name)


def check_text(dataset: Rows, name: str, first: Row, args: SFTConfig, *, named: bool = False) -> tuple[str, ...]:
    """The columns that are trained on, with a text or tokens in every row.

    Args:
        dataset: of which, if it is a stream, only the first row is checked here.
        name: of the data set, for messages.
        first: its first row.
        args: the run's arguments.
        named: as in `names_text_field`.

    Raises:
        ValueError: there are no such columns, or a row holds something else.
    """
    columns = trained_columns(dataset, first, args, named=named)
    if not columns:
        text = args.dataset_text_field
        raise ValueError(
            f"{name}: got no column {text!r}, only {', '.join(map(repr, first))}; allowed: {text!r} (the name is "
            "dataset_text_field), 'messages', 'prompt' and 'completion', or 'input_ids'"
        )
    for column in columns:
        check_values(dataset, name, column, first, allowed_in(columns))
    if columns == TOKENS:
        check_tokens(dataset, name, first)
        return columns
    if columns == PAIR:  # both of one type
        prompt, completion = (first[column] for column in columns)
        allowed = STRING if isinstance(prompt, str) else LIST
        if not fits(completion, allowed):
            raise wrong_value(name, columns[-1], 0, completion, allowed)
    if is_conversational(first, columns):
        for column in columns:
            _check_messages(name, column, first)
        _check_options(dataset, name, first)
    return columns


def _check_messages(name: str, column: str, first: Row) -> None:
    """Refuse a list of other things than messages. A column has one type, so the first row shows it."""
    messages: Any = first[column]
    if not all(isinstance(message, Mapping) and message.keys() & {"role", "from"} for message in messages):
        raise wrong_value(name, column, 0, messages, "a list of dictionaries with 'role' and 'content'")


def _check_options(dataset: Rows, name: str, first: Row) -> None:
    """Check the columns that are passed to the chat template; their nulls are replaced when they are read."""
    for column, allowed in zip(OPTIONS, (TOOLS, DICTIONARY), strict=True):
        row = 0
        if first.get(column) is None and is_plain(dataset) and column in dataset.column_names:
            row = row_with(dataset, column, null=False) or 0
        value = dataset[row][column] if row and is_plain(dataset) else first.get(column)
        if not fits(value, allowed, or_null=True):
            raise wrong_value(name, column, row, value, allowed)


def _skips_preparation(args: SFTConfig) -> bool:
    options: Any = args.dataset_kwargs or {}
    return bool(options.get("skip_prepare_dataset", False))


def _columns(dataset: Rows) -> Sequence[str]:
    return getattr(dataset, "column_names", None) or ()  # a stream may not know them

"""The columns of a trainer's data sets: which of them are trained on, and errors for data sets without such columns."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from unsloth_fast.data.choice import PAIR, trained_columns
from unsloth_fast.data.labels import require_targets, require_targets_in_stream
from unsloth_fast.data.lists import has_lists
from unsloth_fast.data.vocabulary import check_vocabulary, check_while_reading

_VISION = frozenset(
    (
        *("image", "images", "image_sizes", "image_grid_thw", "pixel_values", "pixel_values_videos", "video", "videos"),
        *("pixel_attention_mask", "video_grid_thw", "mm_token_type_ids", "audio", "audios"),
    )
)


def datasets_of(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The name and the value of each data set among a trainer's keywords, also of each entry of a dictionary."""
    for name in ("train_dataset", "eval_dataset"):
        data = given.get(name)
        if isinstance(data, dict):
            yield from ((f"{name}[{key!r}]", part) for key, part in data.items())
        elif data is not None:
            yield name, data


def has_stream(given: Mapping[str, Any]) -> bool:
    """Whether one of the trainer's data sets is a stream, which can only be read from its start."""
    return any(isinstance(dataset, IterableDataset) for _, dataset in datasets_of(given))


def has_vision_columns(given: Mapping[str, Any]) -> bool:
    """Whether one of the trainer's data sets has a column of images, video or audio."""
    return any(_VISION.intersection(_columns(dataset)) for _, dataset in datasets_of(given))


def completion_only(given: Mapping[str, Any], args: SFTConfig, *, named: bool = False) -> bool:
    """Whether only completions are trained on, as TRL decides it from the first row."""
    if args.completion_only_loss is not None:
        return args.completion_only_loss
    data = given.get("train_dataset")
    first: Mapping[str, Any] = {} if data is None else next(iter(data))
    return first.keys() >= set(PAIR) and trained_columns(first, args, named=named) != (args.dataset_text_field,)


def check_columns(given: Mapping[str, Any], args: SFTConfig, vocabulary: int | None) -> None:
    """Refuse, before any work is done, a data set that is empty or has no column to train on.

    Args:
        given: the trainer's keywords.
        args: the run's arguments.
        vocabulary: as in `check_vocabulary`; used here where skip_prepare_dataset leaves no later chance to check.

    Raises:
        ValueError: which data set, what was found, and what is allowed.
        TypeError: several data sets to train on.
    """
    if isinstance(train := given.get("train_dataset"), dict):
        names = ", ".join(map(repr, train))
        raise TypeError(
            f"train_dataset: got a {type(train).__name__} of {names}; allowed: one of them, as `train_dataset` must be "
            "a `Dataset` or `IterableDataset`"
        )
    options: Any = args.dataset_kwargs or {}
    skips_preparation = options.get("skip_prepare_dataset", False)
    for name, dataset in datasets_of(given):
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{name}: got no row; allowed: at least one (check its path, split and filters)")
        if skips_preparation:
            _check_prepared(dataset, name, first, vocabulary)
        elif given.get("formatting_func") is None and not _VISION & first.keys():
            _check_text(dataset, name, first, args.dataset_text_field)


def _check_prepared(dataset: Any, name: str, first: Mapping[str, Any], vocabulary: int | None) -> None:
    """Check tokens and labels that the trainer takes as they are."""
    check_vocabulary(dataset, name, vocabulary)
    if has_lists(dataset, "labels"):
        require_targets(dataset, name)
    elif isinstance(dataset, IterableDataset) and isinstance(first.get("labels"), Sized):
        require_targets_in_stream(check_while_reading(dataset, name, vocabulary), name)


def _check_text(dataset: Any, name: str, first: Mapping[str, Any], text: str) -> None:
    """Check that there are columns to tokenize, with a text in every row."""
    layouts = (  # what each column may hold, in the order in which TRL searches for the columns
        ("a list", "input_ids"),
        ("a string or a list", "prompt", "completion"),
        ("a list", "messages"),
        ("a list", "conversations"),
        ("a string", text),
    )
    allowed, *columns = next((layout for layout in layouts if first.keys() >= set(layout[1:])), ("",))
    if not columns:
        raise ValueError(
            f"{name}: got no column {text!r}, only {', '.join(map(repr, first))}; allowed: {text!r} (the name is "
            "dataset_text_field), 'messages', 'prompt' and 'completion', or 'input_ids'"
        )
    for column in columns:
        _check_values(dataset, name, column, first, allowed)


def _check_values(dataset: Any, name: str, column: str, first: Mapping[str, Any], allowed: str) -> None:
    """Raise for a value of another type than allowed; of a stream only the first row is checked."""
    rows: Any = [first]
    # A column has one type, that of its first value, except for nulls and where it is JSON of any type.
    if isinstance(dataset, Dataset) and column in dataset.column_names:
        mixed = type(dataset.features[column]).__name__ == "Json"  # not in every release of datasets
        if mixed or dataset.data.column(column).null_count:
            rows = dataset.select_columns([column]).with_format(None)
    for index, row in enumerate(rows):
        if not isinstance(row[column], str if allowed == "a string" else Sized):
            raise ValueError(
                f"{name}: got {reprlib.repr(row[column])} in row {index} of column {column!r}; allowed: {allowed} in "
                "every row (drop the others with the data set's `filter`)"
            )


def _columns(dataset: Any) -> Sequence[str]:
    return getattr(dataset, "column_names", None) or ()  # a stream may not know them

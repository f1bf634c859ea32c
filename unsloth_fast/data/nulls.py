"""Nulls that Arrow adds to dictionaries: left out before a chat template writes messages, tools and its variables.

Arrow gives all dictionaries of a column the same keys, and a null to each that lacks one. Templates write a null of a
tool call's arguments or of a tool's schema as text.
"""

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset
from jinja2 import TemplateError

from unsloth_fast.data.types import DataSet, ProcessingClass, Row

logger = logging.getLogger(__name__)

STREAM_CHECK = 100  # rows at the start of a stream that are searched for nulls, for the log alone

_VARIABLES = ("tools", "chat_template_kwargs")
_REPORTED = ("tool_calls", *_VARIABLES)  # nulls elsewhere, such as the tool_calls of a user, are in every data set
_MARK = "unsloth-fast-null"


def renderer(processing_class: ProcessingClass, dataset: DataSet, name: str, columns: Sequence[str]) -> ProcessingClass:
    """The tokenizer or processor for the conversations of a data set, whose chat template is not given Arrow's nulls.

    Nulls in tool calls, tools and template variables are logged.

    Args:
        processing_class: the tokenizer or processor; it is not changed.
        dataset: a data set or a stream of conversations.
        name: of the data set, for the log.
        columns: the columns of messages.

    Returns:
        A copy, or the argument itself where the data set has no null.
    """
    first: Row = next(iter(dataset))
    kept = _written_by_users(dataset, first)
    if kept & {*columns}:
        kept |= {"messages"}
    columns = [*columns, *(column for column in _VARIABLES if column in first)]
    if isinstance(dataset, Dataset):
        rows = dataset.select_columns(columns).with_format("arrow")
        nulls = Counter(path for table in rows.iter(batch_size=10_000) for path in _nulls_in_table(table))
        if not nulls:
            return processing_class
        span = ""
    else:
        rows = ({column: row.get(column) for column in columns} for row in islice(dataset, STREAM_CHECK))
        nulls = Counter(path for row in rows for path in _nulls_in(row))
        span = f" (in its first {STREAM_CHECK} rows)"
    fields = Counter(
        path[-1] for path in nulls.elements() if not {*_REPORTED}.isdisjoint(path[:-1]) and not kept & {*path}
    )
    if fields:
        logger.warning(
            "%s: nulls in %s of tool calls, tools or template variables are left out: %d%s; Arrow adds such nulls to "
            "dictionaries of different keys",
            *(name, ", ".join(map(repr, fields)), fields.total(), span),
        )
    found: Any = copy.copy(processing_class)
    found.apply_chat_template = partial(render, processing_class, kept)
    return found


def render(
    processing_class: ProcessingClass, kept: Collection[str], conversation: Sequence[Row], **options: object
) -> object:
    """`apply_chat_template` without nulls in the messages, the tools and the template's variables.

    A message without content keeps a null, which some templates test; where the template cannot read the null, or would
    write it as text, the content is empty.

    Args:
        processing_class: the tokenizer or processor.
        kept: the fields whose nulls the user wrote; "messages" for the messages themselves.
        conversation: a list of messages.
        **options: of `apply_chat_template`.
    """
    own = inspect.signature(type(processing_class).apply_chat_template).parameters
    options = {
        name: value if name in kept or (name in own and name != "tools") else without_nulls(value, kept)
        for name, value in options.items()
        if value is not None or name in own
    }
    if "messages" not in kept:
        conversation = [_message(message, kept) for message in conversation]
    if any(message.get("content") is None for message in conversation):
        conversation = _readable(processing_class, conversation, options)
    template: Any = processing_class.apply_chat_template
    return template(conversation, **options)


def without_nulls(value: object, kept: Collection[str] = ()) -> object:
    """The value without the keys of dictionaries that are null, at any depth.

    Args:
        value: dictionaries, lists and anything else; the null elements of a list stay.
        kept: keys whose values stay as they are.
    """
    if isinstance(value, Mapping):
        entries = ((key, entry) for key, entry in value.items() if entry is not None)
        return {key: entry if key in kept else without_nulls(entry, kept) for key, entry in entries}
    if isinstance(value, list):
        return [without_nulls(entry, kept) for entry in value]
    return value


def _message(message: Mapping[str, Any], kept: Collection[str]) -> dict[str, Any]:
    names = [name for name, value in message.items() if value is not None or name == "content"]
    return {name: message[name] if name in kept else without_nulls(message[name], kept) for name in names}


def _readable(processing_class: Any, conversation: Sequence[Row], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation, its null contents empty if the template cannot read null, or writes it as text."""
    of_tokens = ("return_dict", "return_assistant_tokens_mask")
    plain = {name: value for name, value in options.items() if name not in of_tokens} | {"tokenize": False}

    def contents(value: str | None) -> list[dict[str, Any]]:
        empty = [{} if message.get("content") is not None else {"content": value} for message in conversation]
        return [{**message, **content} for message, content in zip(conversation, empty, strict=True)]

    try:
        as_null = processing_class.apply_chat_template(contents(None), **plain)
    except (TemplateError, TypeError):
        return contents("")
    marked = processing_class.apply_chat_template(contents(_MARK), **plain)
    as_text = (marked.replace(_MARK, "None"), marked.replace(f'"{_MARK}"', "null"))
    return contents("" if _MARK in marked and as_null in as_text else None)


def _written_by_users(dataset: DataSet, first: Row) -> frozenset[str]:
    """The fields of a data set that hold JSON, to which Arrow adds no null."""
    found = {name for name in _VARIABLES if isinstance(first.get(name), str)}
    return frozenset(found | set(_json_fields(getattr(dataset, "features", None) or {})))


def _json_fields(feature: Any) -> Iterator[str]:
    """The keys below a feature of datasets whose values are JSON of any type."""
    if isinstance(feature, Mapping):
        for name, entry in feature.items():
            inner = entry
            while hasattr(inner, "feature") or isinstance(inner, list):
                inner = inner[0] if isinstance(inner, list) else inner.feature
            if type(inner).__name__ == "Json":  # not in every release of datasets
                yield name
            else:
                yield from _json_fields(inner)


def _nulls_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of each null key below a value."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if entry is None:
                yield (*path, key)
            else:
                yield from _nulls_in(entry, (*path, key))
    elif isinstance(value, list):
        for entry in value:
            yield from _nulls_in(entry, path)


def _nulls_in_table(table: pa.Table) -> Iterable[tuple[str, ...]]:
    """The path of each null key in the columns of a table."""
    for column in table.column_names:
        for chunk in table.column(column).chunks:
            yield from _nulls_in_array(chunk, (column,))


def _nulls_in_array(array: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The path of each null key of the dictionaries in an array, at any depth."""
    array = array.drop_null()
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield from _nulls_in_array(array.flatten(), path)
    elif pa.types.is_struct(array.type):
        for index, field in enumerate(array.type):
            values = array.field(index)
            yield from [(*path, field.name)] * values.null_count
            yield from _nulls_in_array(values, (*path, field.name))

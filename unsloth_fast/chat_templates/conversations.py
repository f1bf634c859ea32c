"""Conversations of data sets: ShareGPT's keys to the standard ones, and columns of an instruction to conversations."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from unsloth_fast.data.types import DataSet, Row

Data = TypeVar("Data", bound=DataSet | Mapping[str, DataSet])

_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"observation": "tool", "function_response": "tool"}
_EMPTY = (None, "", [], {})
_STREAM_CHECK = 1000  # rows at the start of a stream without a schema that are searched for a conversation


def standardize_sharegpt(
    dataset: Data,
    tokenizer: object = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Data:
    """Rewrite conversations of {"from", "value"} as {"role", "content"}, in whatever columns they are.

    Args:
        dataset: a data set, a stream, or a dictionary of them. A data set without such conversations, or whose
            conversations are in the standard form, is returned as it is.
        tokenizer: not used; scripts pass it.
        aliases_for_system: the names of the role "system".
        aliases_for_user: the names of the role "user".
        aliases_for_assistant: the names of the role "assistant". Other names are kept, but "observation" becomes
            "tool".
        batch_size: rows rewritten at a time.
        num_proc: the number of processes, for a data set that is not a stream.

    Returns:
        The data set, its conversations in the same columns.

    Raises:
        ValueError: the data set has no row.
    """
    if isinstance(dataset, dict):
        rest = (tokenizer, aliases_for_system, aliases_for_user, aliases_for_assistant, batch_size, num_proc)
        parts = {name: standardize_sharegpt(part, *rest) for name, part in dataset.items()}
        made = type(dataset)(parts) if isinstance(dataset, DatasetDict | IterableDatasetDict) else parts
        return cast(Data, made)
    rows = cast(DataSet, dataset)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("dataset: got no row; allowed: at least one")
    roles = _ROLES | dict.fromkeys(aliases_for_assistant, "assistant") | dict.fromkeys(aliases_for_user, "user")
    roles |= dict.fromkeys(aliases_for_system, "system")
    columns = [name for name in conversation_columns(rows) if _needs_rewriting(rows, name, roles)]
    if not columns:
        return dataset
    rewrite = partial(_standard_rows, columns=columns, roles=roles)
    options: dict[str, Any] = {}
    if isinstance(rows, Dataset):
        options = {"num_proc": num_proc, "desc": "Standardizing conversations"}
    return cast(Data, rows.map(rewrite, batched=True, batch_size=batch_size, **options))


def standardize_data_formats(dataset: Any, *positional: Any, **keywords: Any) -> Any:
    """The same as `standardize_sharegpt`, under the name that newer scripts call."""
    return standardize_sharegpt(dataset, *positional, **keywords)


def conversation_columns(dataset: DataSet) -> list[str]:
    """The columns that hold conversations, some of which may be empty or null.

    Args:
        dataset: a data set; or a stream, of which, where it does not know its schema, the first rows are searched.
    """
    found: dict[str, bool] = {}
    features = getattr(dataset, "features", None)
    kinds = {field.name: field.type for field in features.arrow_schema} if features else {}
    for row in islice(dataset, 1 if kinds else _STREAM_CHECK):
        for name, value in row.items():
            if not found.get(name):
                found[name] = keys_of(value) is not None or _are_conversations(kinds.get(name))
        if not any(value is None or (isinstance(value, list) and not value) for value in row.values()):
            break
    return [name for name, holds in found.items() if holds]


def _are_conversations(kind: Any) -> bool:
    """Whether the Arrow type is that of lists of messages."""
    if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    value = kind.value_type
    return pa.types.is_struct(value) and keys_of([dict.fromkeys(field.name for field in value)]) is not None


def keys_of(value: object) -> tuple[str, str] | None:
    """The keys of role and content in a conversation; None for anything else."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return None
    return next((keys for keys in _KEYS if value[0].keys() >= set(keys)), None)


def standard_messages(conversation: Iterable[Row], roles: Mapping[str, str]) -> list[dict[str, object]]:
    """The messages of a conversation with the keys "role" and "content", and the roles renamed."""
    messages = []
    for message in conversation:
        role, content = next((keys for keys in _KEYS if message.get(keys[0]) is not None), _KEYS[0])
        rest = {name: value for name, value in message.items() if name not in (role, content) and value is not None}
        given: Any = message[role]
        messages.append({"role": roles.get(given, given), "content": message[content]} | rest)
    return messages


def _needs_rewriting(dataset: Any, name: str, roles: Mapping[str, str]) -> bool:
    """Whether any conversation of the column has other keys or roles than the standard ones."""
    if not isinstance(dataset, Dataset):  # later rows of a stream are unknown, and standard messages pass unchanged
        return True
    kind = dataset.data.schema.field(name).type
    if not _are_conversations(kind):
        return False
    if not {"role", "content"} <= {field.name for field in kind.value_type}:
        return True
    table: Any = dataset.select_columns([name]).with_format("arrow")[:]
    for conversations in table.column(name).chunks:
        given = conversations.flatten().field("role").unique().to_pylist()
        if any(role is None or roles.get(role, role) != role for role in given):
            return True
    return False


def _standard_rows(
    rows: Mapping[str, list[Any]], columns: Sequence[str], roles: Mapping[str, str]
) -> dict[str, list[Any]]:
    return {name: [standard_messages(conversation or [], roles) for conversation in rows[name]] for name in columns}


def to_sharegpt(
    dataset: DataSet,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> DataSet:
    """Make conversations in ShareGPT's form from columns of instructions and answers.

    Args:
        dataset: a data set or a stream.
        merged_prompt: the text of a user, in which {column} is replaced by the column's value. What is in [[double
            brackets]] is left out where one of its columns is empty. Without it the column `merged_column_name` is the
            text.
        merged_column_name: the column of the user's text, used where merged_prompt is empty; with it, and
            remove_unused_columns=False, the column into which the merged text is written.
        output_column_name: the column of the answers.
        remove_unused_columns: whether only the column "conversations" is kept.
        conversation_extension: how many rows make one conversation. Conversation i begins with row i; the others are
            drawn at random. There are as many conversations as rows.
        random_state: the seed of that.

    Returns:
        The data set, with a column "conversations" of lists of {"from": "human" or "gpt", "value": text}.

    Raises:
        ValueError: a column that does not exist, an extension below 1, or above 1 for a stream.
    """
    streamed = isinstance(dataset, IterableDataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("dataset: got no row; allowed: at least one")
    prompt = _prompt(merged_prompt or f"{{{merged_column_name}}}", first)
    if output_column_name not in first:
        raise ValueError(f"output_column_name: got {output_column_name!r}; allowed: {', '.join(map(repr, first))}")
    allowed = "1 for a stream" if streamed else "an integer from 1"
    most = 1 if streamed else conversation_extension
    if not isinstance(conversation_extension, int) or not 1 <= conversation_extension <= most:
        raise ValueError(f"conversation_extension: got {conversation_extension!r}; allowed: {allowed}")
    removed = list(first) if remove_unused_columns else []
    merged = merged_column_name if merged_prompt and not remove_unused_columns else None
    make = partial(_conversation, prompt=prompt, answer=output_column_name, merged=merged)
    result: Any = dataset.map(make, remove_columns=removed)
    if conversation_extension == 1:
        return result
    generator = np.random.default_rng(random_state)
    orders = [generator.permutation(len(result)) for _ in range(conversation_extension - 1)]
    turns = result["conversations"][:]
    longer = [turns[i] + [turn for order in orders for turn in turns[int(order[i])]] for i in range(len(turns))]
    rest = result.remove_columns("conversations")
    if not rest.column_names:
        return Dataset.from_dict({"conversations": longer}, split=result.split)
    return rest.add_column("conversations", longer)


def _conversation(
    row: Mapping[str, Any], prompt: Callable[[Mapping[str, Any]], str], answer: str, merged: str | None
) -> dict[str, Any]:
    text = prompt(row)
    given = "" if row[answer] is None else str(row[answer])
    conversation = [{"from": "human", "value": text}, {"from": "gpt", "value": given}]
    return {"conversations": conversation} | ({merged: text} if merged else {})


def _prompt(merged_prompt: str, row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """The function that fills in the columns of a row."""
    parts = re.split(r"\[\[(.*?)\]\]", merged_prompt, flags=re.DOTALL)  # every second part is optional
    names = re.findall(r"\{([^{}]+)\}", merged_prompt)
    for name in names:
        if name not in row:
            raise ValueError(f"merged_prompt: got {{{name}}}; allowed: {', '.join(f'{{{name}}}' for name in row)}")
    if merged_prompt and not names:
        raise ValueError("merged_prompt: got no {column}; allowed: a text with at least one column in braces")
    return partial(_filled, parts)


def _filled(parts: Sequence[str], row: Mapping[str, Any]) -> str:
    text = ""
    for index, part in enumerate(parts):
        names = re.findall(r"\{([^{}]+)\}", part)
        if index % 2 and any(row[name] in _EMPTY for name in names):
            continue
        text += re.sub(r"\{([^{}]+)\}", lambda found: "" if row[found[1]] is None else str(row[found[1]]), part)
    return text

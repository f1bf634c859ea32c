"""Nulls that Arrow adds to tool calls, tools and template variables do not reach a chat template."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from tests.chat_tokenizers import byte_level
from tests.data.samples import stream
from tests.trainer.runs import arguments
from unsloth_fast.chat_templates import apply_chat_template
from unsloth_fast.data.nulls import without_nulls
from unsloth_fast.data.text import read_texts

# Everything is written as text, in both of the ways in which templates do it.
TEMPLATE = """{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ date }}
{%- for message in messages %}{{ message['role'] }}:CONTENT
{%- for call in message['tool_calls'] or [] %}{{ call.function.arguments | tojson }}{{ call.function.arguments }}
{%- endfor %}{{ message.keys() | reject('equalto', 'content') | list }}|{% endfor %}"""
WRITTEN = TEMPLATE.replace("CONTENT", "{{ message['content'] }}")


def call(**arguments_of_call: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments_of_call}}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def tool(**properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}


USER = {"role": "user", "content": "Hi"}
CHATS = [[USER, call(city="Paris", units=["C", None])], [USER, call(a=1, b={"x": 2}), USER], [USER, call()]]
TOOLS = [[tool(city={"type": "string"})], [tool(a={"type": "integer", "default": 1}), tool(b={})], None]
VARIABLES = [{"date": "today"}, {"other": 1}, {}]


def tokenizer(template: str = WRITTEN) -> Any:
    made = copy.deepcopy(byte_level())
    made.chat_template = template
    return made


def written(made: Any, data: Any, folder: Path, **options: Any) -> list[str]:
    """The texts that TRL's calls of the tokenizer receive."""
    read = read_texts(data, "train", arguments(folder, **options), made)
    texts = []
    for row in read.dataset:
        chat = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        variables = row.get("chat_template_kwargs") or {}
        texts.append(read.processing_class.apply_chat_template(chat, tools=tools, tokenize=False, **variables))
    return texts


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_the_text_is_that_of_the_users_own_objects(
    pairs: bool, streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This holds for dictionaries in dictionaries, for empty ones, and for lists with nulls too."""
    rows = [
        ({"prompt": chat[:1], "completion": chat[1:]} if pairs else {"messages": chat})
        | {"tools": tools, "chat_template_kwargs": variables}
        for chat, tools, variables in zip(CHATS, TOOLS, VARIABLES, strict=True)
    ]
    data = Dataset.from_list(rows)
    made = tokenizer()
    texts = written(made, data.to_iterable_dataset() if streamed else data, tmp_path)
    assert texts == [
        made.apply_chat_template(chat, tools=tools, tokenize=False, **variables)
        for chat, tools, variables in zip(CHATS, TOOLS, VARIABLES, strict=True)
    ]
    assert not any(
        null in text.replace("None]", "").replace("null]", "") for text in texts for null in ("None", "null")
    )
    (message,) = [record.getMessage() for record in caplog.records if "nulls in '" in record.getMessage()]
    assert message.startswith("train: ") and "'city'" in message and message.count("Arrow adds") == 1


def test_data_without_such_nulls_keep_the_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer()
    data = Dataset.from_list([{"messages": [USER, USER]}])
    assert read_texts(data, "train", arguments(tmp_path), made).processing_class is made
    mixed = Dataset.from_list([{"messages": [USER, USER | {"tool_calls": [], "name": "x"}]}])
    assert written(made, mixed, tmp_path) == ["user:Hi['role']|user:Hi['role', 'tool_calls', 'name']|"]
    assert caplog.text == ""  # every data set with tool calls has such nulls


@pytest.mark.parametrize(
    ("content", "null", "read"),
    [
        ("{{ message['content'] }}", "", ""),
        ("{{ message['content'] | trim }}", "", ""),
        ("{{ '' + message['content'] }}", "", ""),
        ("{{ message['content'] | tojson }}", "", '""'),
        ("{{ message['content'] if message['content'] is string else '' }}", None, ""),
        ("{% if message['content'] %}{{ message['content'] }}{% endif %}", None, ""),
        ("{% if 'content' in message and message.content is not none %}{{ message.content }}{% endif %}", None, ""),
        ("{% if message['content'] is none %}<call>{% else %}{{ message['content'] }}{% endif %}", None, ""),
    ],
)
@pytest.mark.parametrize("key", [True, False])
def test_a_message_without_content(content: str, null: Any, read: str, key: bool, tmp_path: Path) -> None:
    """A template that tests the null receives it, if transformers passes it; others would write "None", or fail."""
    made = tokenizer("{% for message in messages %}" + content + "|{% endfor %}")
    message = call(city="Paris")
    message = message | {"content": None} if key else {"role": "assistant", "tool_calls": message["tool_calls"]}
    data = Dataset.from_list([{"messages": [USER, message]}])
    expected = made.apply_chat_template([USER, message | {"content": null}], tokenize=False)
    assert written(made, data, tmp_path) == [expected] and expected.endswith(f"{read}|")


def test_nulls_in_json_are_the_users(tmp_path: Path) -> None:
    made = tokenizer("{{ tools | tojson }}")
    tools = [{"name": "f", "default": None}]
    data = Dataset.from_list([{"messages": [USER, USER | {"name": "x"}], "tools": json.dumps(tools)}])
    assert json.loads(written(made, data, tmp_path)[0]) == tools


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets before 5")
def test_nulls_in_columns_of_json_are_the_users(tmp_path: Path) -> None:
    made = tokenizer()
    chats = [[USER, call(city="Paris", unit=None)], [USER, call(a=None)]]
    features = Dataset.from_list([{"messages": chat} for chat in chats]).features
    features["messages"].feature["tool_calls"].feature["function"]["arguments"] = datasets.Json()
    data = Dataset.from_list([{"messages": chat} for chat in chats], features=features)
    assert written(made, data, tmp_path) == [made.apply_chat_template(chat, tokenize=False) for chat in chats]


@pytest.mark.parametrize("streamed", [False, True])
def test_apply_chat_template(streamed: bool) -> None:
    made = tokenizer()
    data = Dataset.from_list([{"conversations": chat} for chat in CHATS])
    rows = apply_chat_template(data.to_iterable_dataset() if streamed else data, made)
    assert [row["text"] for row in rows] == [made.apply_chat_template(chat, tokenize=False) for chat in CHATS]


def test_elements_of_lists_stay() -> None:
    value = {"a": None, "b": [None, {"c": None, "d": 0}], "e": {}, "f": {"g": None}}
    assert without_nulls(value) == {"b": [None, {"d": 0}], "e": {}, "f": {}}
    assert without_nulls(value, {"f"}) == {"b": [None, {"d": 0}], "e": {}, "f": {"g": None}}


def test_a_stream_of_python_objects(tmp_path: Path) -> None:
    made = tokenizer()
    data = stream(Dataset.from_list([{"messages": chat} for chat in CHATS]))
    assert written(made, data, tmp_path) == [made.apply_chat_template(chat, tokenize=False) for chat in CHATS]

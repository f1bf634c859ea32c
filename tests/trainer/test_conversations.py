"""Data sets of conversations: ShareGPT columns, columns merged into conversations, templates by example."""

from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from tests.trainer.chat_formats import CHATML, MESSAGES, SHAREGPT
from tests.trainer.test_chat_templates import tokenizer, written
from unsloth_fast.chat_templates import (
    apply_chat_template,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)


def data(conversations: Any, column: str = "conversations", streamed: bool = False) -> Any:
    rows = Dataset.from_list([{column: entry, "id": index} for index, entry in enumerate(conversations)])
    return rows.to_iterable_dataset() if streamed else rows


@pytest.mark.parametrize("standardize", [standardize_sharegpt, standardize_data_formats])
@pytest.mark.parametrize("column", ["conversations", "messages", "chat"])
@pytest.mark.parametrize("streamed", [False, True])
def test_sharegpt_becomes_standard(standardize: Any, column: str, streamed: bool) -> None:
    found = standardize(data([SHAREGPT, [], SHAREGPT[1:3]], column, streamed))
    assert isinstance(found, IterableDataset) == streamed
    rows = list(found)
    assert [row[column] for row in rows] == [MESSAGES, [], MESSAGES[1:3]]
    assert [row["id"] for row in rows] == [0, 1, 2]


def without_schema(rows: Dataset) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows.to_list()))


@pytest.mark.parametrize("first", [[], None])
@pytest.mark.parametrize("given", [Dataset.with_format, Dataset.to_iterable_dataset, without_schema])
def test_an_empty_conversation_first(given: Any, first: Any) -> None:
    """It does not hide the others, and its text is empty."""
    rows = given(data([first, SHAREGPT]))
    assert [row["conversations"] for row in standardize_sharegpt(rows)] == [[], MESSAGES]
    made = get_chat_template(tokenizer(), "chatml")
    assert [row["text"] for row in apply_chat_template(rows, made)] == ["", written(made, MESSAGES)]


def test_a_standard_data_set_is_returned_as_it_is() -> None:
    given = data([MESSAGES, MESSAGES[:2]])
    assert standardize_sharegpt(given) is given
    other = Dataset.from_dict({"text": ["a"], "numbers": [[1, 2]]})
    assert standardize_sharegpt(other) is other


def test_roles_of_other_names_in_standard_keys() -> None:
    rows = [
        [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}, {"role": "observation", "content": "c"}]
    ]
    found = standardize_sharegpt(data(rows), aliases_for_assistant=["bot"])
    assert [entry["role"] for entry in found[0]["conversations"]] == ["user", "assistant", "tool"]


def test_further_keys_of_a_message_are_kept() -> None:
    found = standardize_sharegpt(data([[{"from": "human", "value": "a", "name": "x"}, {"from": "gpt", "value": "b"}]]))
    first, second = found[0]["conversations"]
    assert first == {"role": "user", "content": "a", "name": "x"}
    assert (second["role"], second["content"]) == ("assistant", "b")


def test_several_splits() -> None:
    found = standardize_sharegpt(DatasetDict({"train": data([SHAREGPT]), "test": data([SHAREGPT])}))
    assert isinstance(found, DatasetDict)
    assert found["test"][0]["conversations"] == MESSAGES


def test_no_row() -> None:
    with pytest.raises(ValueError, match="dataset: got no row; allowed: at least one"):
        standardize_sharegpt(Dataset.from_dict({"conversations": []}))


ALPACA_ROWS = {
    "instruction": ["Add", "Sing", "Count", "Name"],
    "input": ["1 and 2", "", None, "a dog"],
    "output": ["3", "la", "1 2 3", "Rex"],
}


@pytest.mark.parametrize("streamed", [False, True])
def test_columns_become_conversations(streamed: bool) -> None:
    rows = Dataset.from_dict(ALPACA_ROWS)
    found = to_sharegpt(
        rows.to_iterable_dataset() if streamed else rows, merged_prompt="{instruction}:[[\nWith: {input}.]]"
    )
    asked = ["Add:\nWith: 1 and 2.", "Sing:", "Count:", "Name:\nWith: a dog."]
    expected = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]}
        for text, answer in zip(asked, ALPACA_ROWS["output"], strict=True)
    ]
    assert list(found) == expected


def test_longer_conversations() -> None:
    """Each begins with its own row; the further ones are drawn, each row as often as any other."""
    rows = Dataset.from_dict(ALPACA_ROWS)
    longer = to_sharegpt(rows, conversation_extension=3)
    assert longer.column_names == ["conversations"]
    answers = [[turn["value"] for turn in row["conversations"][1::2]] for row in longer]
    assert [entry[0] for entry in answers] == ALPACA_ROWS["output"]
    for place in range(3):
        assert sorted(entry[place] for entry in answers) == sorted(ALPACA_ROWS["output"])
    assert list(to_sharegpt(rows, conversation_extension=3)) == list(longer)
    wide = to_sharegpt(rows, conversation_extension=3, remove_unused_columns=False)
    assert (wide["conversations"][:], wide["input"][:]) == (longer["conversations"][:], ALPACA_ROWS["input"])
    assert list(to_sharegpt(rows, conversation_extension=3, random_state=1)) != list(longer)


def test_other_columns_are_kept_where_that_is_asked() -> None:
    rows = Dataset.from_dict(ALPACA_ROWS)
    found = to_sharegpt(rows, merged_prompt="{input}!", merged_column_name="merged", remove_unused_columns=False)
    assert set(found.column_names) == {"instruction", "input", "output", "merged", "conversations"}
    assert found["merged"][:2] == ["1 and 2!", "!"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"merged_prompt": "{instructions}"},
            r"merged_prompt: got \{instructions\}; allowed: \{instruction\}, \{input\}",
        ),
        ({"merged_prompt": "Hello"}, r"merged_prompt: got no \{column\}"),
        (
            {"output_column_name": "answer"},
            "output_column_name: got 'answer'; allowed: 'instruction', 'input', 'output'",
        ),
        ({"conversation_extension": 0}, "conversation_extension: got 0; allowed: an integer from 1"),
    ],
)
def test_columns_that_cannot_be_merged(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_sharegpt(Dataset.from_dict(ALPACA_ROWS), **options)


def test_a_stream_is_not_extended() -> None:
    with pytest.raises(ValueError, match="conversation_extension: got 2; allowed: 1 for a stream"):
        to_sharegpt(Dataset.from_dict(ALPACA_ROWS).to_iterable_dataset(), conversation_extension=2)


EXAMPLES = {
    "alpaca": (
        "Solve it.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}",
        "<s>Solve it.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
        "\n\n### Instruction:\n2+2?\n\n### Response:\n4</s>",
    ),
    "two turns": (
        "Solve it.\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}",
        "<s>Solve it.\n\n### Q:\nHi\n\n### A:\nHello</s>\n\n### Q:\n2+2?\n\n### A:\n4</s>",
    ),
    "system": (
        "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}",
        "<s>Be kind.\nUSER: Hi\nASSISTANT: Hello</s>\nUSER: 2+2?\nASSISTANT: 4</s>",
    ),
    "headers": (
        "<s><h>system</h>{SYSTEM}<end><h>user</h>{INPUT}<end><h>assistant</h>{OUTPUT}<end>",
        "<s><h>system</h>Be kind.<end><h>user</h>Hi<end><h>assistant</h>Hello<end>"
        "<h>user</h>2+2?<end><h>assistant</h>4<end>",
    ),
    "lines": (
        ">>> Q: {INPUT}\n>>> A: {OUTPUT}\n",
        "<s>>>> Q: Hi\n>>> A: Hello</s>\n>>> Q: 2+2?\n>>> A: 4</s>\n",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_template_by_example(name: str, streamed: bool) -> None:
    example, expected = EXAMPLES[name]
    made = tokenizer("<end>")
    system = "Be kind." if "{SYSTEM}" in example else None
    for rows in (SHAREGPT[1:], MESSAGES[1:]):
        found = apply_chat_template(data([rows], streamed=streamed), made, example, default_system_message=system)
        assert next(iter(found))["text"] == expected
    prompt = written(made, MESSAGES[1:2], add_generation_prompt=True)
    assert expected.startswith(prompt)
    assert expected[len(prompt) :].startswith("Hello")


def test_the_tokenizers_own_template_on_a_data_set() -> None:
    made = get_chat_template(tokenizer(), "chatml")
    found = apply_chat_template(data([SHAREGPT]), made)
    assert found["text"][0] == "".join(CHATML[:4])
    assert found.column_names == ["conversations", "id", "text"]


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ("Hello {INPUT}", {}, r"chat_template: got \{INPUT\}; allowed: \{INPUT\}, \{OUTPUT\}, once or twice, after"),
        ("Hello", {}, "chat_template: got no field"),
        ("{OUTPUT}{INPUT}", {}, r"chat_template: got \{OUTPUT\}, \{INPUT\}"),
        ("Q{INPUT}A{OUTPUT}", {"default_system_message": "S"}, "default_system_message: got 'S'; allowed: None, or a"),
    ],
)
def test_an_example_that_is_none(example: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_chat_template(data([SHAREGPT]), tokenizer(), example, **options)


def test_a_data_set_without_conversations() -> None:
    with pytest.raises(ValueError, match="dataset: got no conversation in the columns 'text'; allowed: a column"):
        apply_chat_template(Dataset.from_dict({"text": ["a"]}), tokenizer(), EXAMPLES["alpaca"][0])

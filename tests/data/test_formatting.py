"""A formatting_func of a row or of a batch makes one text per row."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from tests.data.test_text import CHATS, END, chatml, plain, read
from tests.trainer.runs import arguments
from unsloth_fast.data.text import read_texts

ROWS = {"question": ["Add", "Count"], "answer": ["3", "1 2"], "letter": ["a", "b"]}
EXPECTED = ["Add: 3", "Count: 1 2"]


def of_a_row(row: Any) -> str:
    return f"{row['question']}: {row['answer']}"


def with_sum(row: Any) -> str:
    return row["question"] + ": " + row["answer"]


def of_a_batch(rows: Any) -> list[str]:
    texts = []
    for question, answer in zip(rows["question"], rows["answer"], strict=False):
        texts.append(f"{question}: {answer}")
    return texts


def by_index(rows: Any) -> list[str]:
    return [rows["question"][index] + ": " + rows["answer"][index] for index in range(len(rows["question"]))]


FUNCTIONS = {
    "row": of_a_row,
    "row, sum": with_sum,
    "row, list": lambda row: [of_a_row(row)],
    "row, tuple": lambda row: (with_sum(row),),
    "row, dictionary": lambda row: {"text": with_sum(row)},
    "batch": of_a_batch,
    "batch, index": by_index,
    "batch, tuple": lambda rows: tuple(by_index(rows)),
    "batch, dictionary": lambda rows: {"text": of_a_batch(rows)},
    "batch, field": lambda rows: {"body": of_a_batch(rows)},
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_each_row_has_its_text(function: Any, streamed: bool, count: int, tmp_path: Path) -> None:
    made = chatml()
    data = Dataset.from_dict(ROWS).select(range(count))
    rows = read(tmp_path, made, data, streamed=streamed, function=function, dataset_text_field="body")
    assert [row["input_ids"] for row in rows] == [[1, *plain(made, f"{text}{END}")] for text in EXPECTED[:count]]


def test_a_batch_of_conversations(tmp_path: Path) -> None:
    """A row of it is a list of messages, which such a function takes for conversations and cannot write."""
    made = chatml()

    def function(rows: Any) -> list[str]:
        return [made.apply_chat_template(chat, tokenize=False) for chat in rows["messages"]]

    rows = read(tmp_path, made, {"messages": CHATS}, function=function)
    texts = [made.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert [row["input_ids"] for row in rows] == [[1, *plain(made, text)] for text in texts]


def test_one_letter_per_column(tmp_path: Path) -> None:
    """Such a row is a batch of one letter."""
    made = chatml()
    rows = read(tmp_path, made, ROWS, function=lambda rows: [f"<{letter}>" for letter in rows["letter"]])
    assert [row["input_ids"] for row in rows] == [[1, *plain(made, f"<{letter}>{END}")] for letter in "ab"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (lambda row: None, "None"),
        (lambda row: 3, "3"),
        (lambda row: [of_a_row(row)] * 3, r"\['Add: 3', 'Add: 3', 'Add: 3'\]"),
        (lambda row: [1], r"\[1\]"),
        (lambda row: {"words": of_a_row(row)}, r"\{'words': .*\}"),
        (lambda row: [{"role": "user", "content": of_a_row(row)}], r"\[\{.*\}\]"),
    ],
)
def test_anything_else_is_refused(function: Any, shown: str, streamed: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^formatting_func: got {shown}; allowed: a function of a row that returns a"):
        read(tmp_path, chatml(), ROWS, streamed=streamed, function=function)


def test_a_later_row_without_a_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^formatting_func: got None; allowed"):
        read(tmp_path, chatml(), ROWS, function=lambda row: None if row["question"] == "Count" else "Hi")


def test_the_users_own_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="qestion"):
        read(tmp_path, chatml(), ROWS, function=lambda row: row["qestion"])


def test_tokens_are_not_formatted(tmp_path: Path) -> None:
    (row,) = read(tmp_path, chatml(), {"input_ids": [[3]]}, function=of_a_row)
    assert row == {"input_ids": [3]}


def test_a_stream_is_read_row_by_row(tmp_path: Path) -> None:
    """A batched function too: nothing beyond the first rows is read in advance."""
    seen: list[int] = []

    def rows() -> Any:
        for index in range(50):
            seen.append(index)
            yield {"question": str(index), "answer": "x"}

    args = arguments(tmp_path)
    data = read_texts(IterableDataset.from_generator(rows), "train", args, chatml(), of_a_batch).dataset
    seen.clear()
    next(iter(data))
    assert seen[-1] <= 1

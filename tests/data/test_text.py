"""Texts to tokens: those of the text as it is printed, with one begin token and one end."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from tests.chat_tokenizers import byte_level
from tests.data.samples import stream
from tests.trainer.runs import arguments
from unsloth_fast.chat_templates import get_chat_template
from unsloth_fast.data.text import read_texts

CHATS = [
    [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Because of the air."}],
    [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3\n"}],
]
SHAREGPT = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]] * 2
END = "<|im_end|>"
ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def chatml(begin: str = "", single: str = "<s> $A") -> PreTrainedTokenizerFast:
    """A tokenizer that adds a begin token, with ChatML, which ends turns with the end token and a newline."""
    made = get_chat_template(copy.deepcopy(byte_level()), "chatml")
    made.chat_template = begin + made.chat_template
    specials = [(name, made.convert_tokens_to_ids(name)) for name in ("<s>", END)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    return made


def plain(made: Any, text: str) -> list[int]:
    """The tokens of a text, and of nothing else."""
    return made(text, add_special_tokens=False)["input_ids"]


def read(
    folder: Path,
    made: Any,
    columns: Any,
    *,
    streamed: bool = False,
    function: Any = None,
    named: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """The rows that TRL receives."""
    data = Dataset.from_dict(columns) if isinstance(columns, dict) else columns
    data = stream(data) if streamed else data
    return list(read_texts(data, "train", arguments(folder, SFTConfig, **options), made, function, named=named).dataset)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("formatted", [False, True])
def test_texts_of_the_template_are_read_as_they_are_printed(
    formatted: bool, streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No second begin token is added, and no end token behind the newline of the last turn."""
    made = chatml("{{ bos_token }}")
    texts = [made.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert all(text.startswith("<s>") and text.endswith(f"{END}\n") for text in texts)
    options: dict[str, Any] = {"function": lambda row: row["chat"]} if formatted else {}
    rows = read(tmp_path, made, {"chat" if formatted else "text": texts}, streamed=streamed, **options)
    assert [row["input_ids"] for row in rows] == [plain(made, text) for text in texts]
    assert [row["text"] for row in rows] == texts
    counted = "texts of the stream" if streamed else "2 of 2 texts"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"train: the tokenizer's begin token is not added to {counted} that begin with '<s>'",
        f"train: eos_token '{END}' is not added to {counted} that end with the end of a turn, '{END}'",
    ]


@pytest.mark.parametrize("single", ["$A", "<s> $A", f"<s> $A {END}"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi", f"Hi{END}"),
        (" Hi\n", f" Hi\n{END}"),
        ("", END),
        (f"Hi{END}", f"Hi{END}"),
        (f"Hi{END}\n", f"Hi{END}\n"),
        (f"Hi{END} \n\n", f"Hi{END} \n\n"),
        (f"{END}Hi", f"{END}Hi{END}"),
        (ASKED, ASKED),
    ],
)
@pytest.mark.parametrize("begin", ["", "<s>", "\n<s>"])
def test_one_begin_token_and_one_end(single: str, text: str, expected: str, begin: str, tmp_path: Path) -> None:
    """This holds whichever of them the tokenizer adds; a plain text without an end token receives one."""
    made = chatml(single=single)
    (row,) = read(tmp_path, made, {"text": [begin + text]})
    added = [made.bos_token_id] if "<s>" in single and not begin else []
    assert row["input_ids"] == added + plain(made, begin + expected)


@pytest.mark.parametrize(
    ("template", "text", "adds_end"),
    [
        ("llama-3.1", "Hi<|eot_id|>", False),
        ("llama-3.1", "Hi<|im_end|>", True),
        ("gemma-3", "Hi<end_of_turn>\n", False),
        ("gemma-3", "Hi<end_of_turn>", False),
        ("phi-3", "Hi<|end|>\n", False),
        ("vicuna", "Hi\n", True),
        (None, "Hi<|eot_id|>", True),
    ],
)
def test_the_end_of_a_turn_may_be_another_token(
    template: str | None, text: str, adds_end: bool, tmp_path: Path
) -> None:
    made = copy.deepcopy(byte_level())
    if template is not None:
        get_chat_template(made, template, map_eos_token=False)
    (row,) = read(tmp_path, made, {"text": [text]})
    assert row["input_ids"] == [1, *plain(made, text), *([made.eos_token_id] if adds_end else [])]


@pytest.mark.parametrize("streamed", [False, True])
def test_prompts_and_completions(streamed: bool, tmp_path: Path) -> None:
    """The begin token that a prompt has, and the end that a completion has, are not added again."""
    made = chatml()
    pairs = [("Why? ", "Because."), ("<s>Why? ", f"Because.{END}\n"), ("", f"Hi{END}"), ("Add", "")]
    columns = dict(zip(("prompt", "completion"), map(list, zip(*pairs, strict=True)), strict=True))
    rows = read(tmp_path, made, columns, streamed=streamed)
    expected = [([1, *plain(made, "Why? ")], f"Because.{END}"), (plain(made, "<s>Why? "), f"Because.{END}\n")]
    expected += [([1], f"Hi{END}"), ([1, *plain(made, "Add")], END)]
    for row, (asked, answer) in zip(rows, expected, strict=True):
        answered = plain(made, answer)
        assert row["input_ids"] == asked + answered
        assert row["completion_mask"] == [0] * len(asked) + [1] * len(answered)


def test_a_prompt_that_merges_with_its_completion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The merged token belongs to the completion, as with TRL."""
    made = chatml()
    (row,) = read(tmp_path, made, {"prompt": ["The sk"], "completion": ["y"]})
    whole = plain(made, f"The sky{END}")
    asked = plain(made, "The sk")
    common = next(index for index, token in enumerate(asked) if token != whole[index])
    assert row["completion_mask"] == [0] * (1 + common) + [1] * (len(whole) - common)
    assert "merges with the completion in 1 of 1 texts" in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"messages": CHATS}, False),
        ({"conversations": SHAREGPT}, False),
        ({"conversations": CHATS, "prompt": ["a", "b"]}, False),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, True),
        ({"prompt": ["a", "b"], "labels": [0, 1], "seq_lengths": [[1], [1]]}, False),
    ],
)
def test_the_text_is_trained_on_and_not_what_is_beside_it(
    beside: dict[str, Any], named: bool, streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = chatml()
    rows = read(tmp_path, made, {"text": ["Hi", "Hello"]} | beside, streamed=streamed, named=named)
    assert [row["input_ids"] for row in rows] == [[1, *plain(made, f"{text}{END}")] for text in ("Hi", "Hello")]
    assert not {*beside} & rows[0].keys()
    assert f"train: trained on 'text'; not read: {', '.join(map(repr, sorted(beside)))}" in caplog.text


def test_conversations_in_the_standard_form_are_messages(tmp_path: Path) -> None:
    """TRL knows them by this name alone."""
    (first, _) = read(tmp_path, chatml(), {"conversations": CHATS})
    assert first == {"messages": CHATS[0]}


def test_a_row_of_a_stream_without_a_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train: got None in row 1 of column 'text'; allowed: a string in every"):
        read(tmp_path, chatml(), {"text": ["Hi", None]}, streamed=True)


@pytest.mark.parametrize(
    ("columns", "function"),
    [({"text": ["Hi"]}, None), ({"prompt": ["a"], "completion": ["b"]}, None), ({"x": ["Hi"]}, lambda row: row["x"])],
)
def test_a_tokenizer_without_an_end_token(columns: dict[str, Any], function: Any, tmp_path: Path) -> None:
    made = chatml()
    made.eos_token = None
    with pytest.raises(ValueError, match=r"^processing_class: got a tokenizer without eos_token; allowed: one with it"):
        read(tmp_path, made, columns, function=function)
    (tokens,) = read(tmp_path, made, {"input_ids": [[3, 4]]})
    assert tokens == {"input_ids": [3, 4]}


@pytest.mark.parametrize(
    "columns",
    [{"messages": CHATS}, {"conversations": SHAREGPT}, {"prompt": [CHATS[0][:1]], "completion": [CHATS[0][1:]]}],
)
def test_conversations_and_a_tokenizer_without_a_template(columns: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^processing_class: got a tokenizer without chat_template for the conversat"):
        read(tmp_path, byte_level(), columns)


def test_the_given_data_set_and_tokenizer_do_not_change(tmp_path: Path) -> None:
    made = chatml()
    data = Dataset.from_dict({"text": ["Hi"], "labels": [0], "messages": CHATS[:1]})
    before, names = data.to_list(), {*vars(made)}
    read(tmp_path, made, data)
    read(tmp_path, made, data.remove_columns("text"))
    assert data.to_list() == before and {*vars(made)} == names


def test_a_row_of_a_stream_without_the_column(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"text": "Hi", "labels": 0}
        yield {"text": "Hello"}
        yield {"labels": 0}

    made = chatml()
    read_rows = iter(read_texts(IterableDataset.from_generator(rows), "train", arguments(tmp_path), made).dataset)
    assert [next(read_rows)["input_ids"] for _ in range(2)] == [[1, *plain(made, f"{x}{END}")] for x in ("Hi", "Hello")]
    with pytest.raises(ValueError, match=r"^train: got None in row 2 of column 'text'; allowed"):
        next(read_rows)

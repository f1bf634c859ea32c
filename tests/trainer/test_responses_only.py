"""Training on responses only: the labels are those masked by hand, and so is the loss."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.utils.chat_template_utils import render_jinja_template

from tests.chat_tokenizers import byte_level, metaspace
from unsloth_fast.chat_templates import CHAT_TEMPLATES, get_chat_template, train_on_responses_only
from unsloth_fast.chat_templates.parts import find_parts
from unsloth_fast.data.responses import ResponseLabels, forms_of

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENIZERS = {"byte level": byte_level, "metaspace": metaspace}
CONTENTS = [
    ["Why is the sky blue?", "Because of the air."],
    ["Hi", "Hello user, hello assistant.", "Add 1 and 2.", "3", "Who are you?", "- A model.\n- Two."],
    ["Count\n\n", "1\n2\n3", " Hi ", " Hello "],
    ["The user says: assistant", "model\nuser\nassistant"],
]


def conversation(contents: list[str]) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]


def responses_by_hand(made: Any, messages: list[dict[str, str]]) -> list[int]:
    """Labels of a written conversation, from the places of its responses in the text, as the template marks them.

    A token across the edge of a response is a target if it begins in the response, or holds more of it than spaces.
    """
    rendered, spans = render_jinja_template(
        conversations=[messages],
        chat_template=made.chat_template,
        return_assistant_tokens_mask=True,
        date_string="1 Jan 2024",
        **made.special_tokens_map,
    )
    text, inside = rendered[0], np.zeros(len(rendered[0]), bool)
    for begin, end in spans[0]:
        inside[begin:end] = True
    visible = inside & ~np.char.isspace(np.array(list(text)))
    encoded = made(text, add_special_tokens=False, return_offsets_mapping=True)
    return [
        token if inside[first : first + 1].any() or visible[first:last].any() else -100
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


FORMATS = [name for name in CHAT_TEMPLATES if name not in ("llama-2", "yi-chat", "gemma2", "gemma-3n", "phi-3.5")]


def random_contents(count: int) -> list[list[str]]:
    """Contents that may begin, end and consist of what tokenizers merge with the parts."""
    pick = random.Random(0)
    pieces = ["a", "b", "1", " ", "\n", ".", "#", "user", "assistant", "[", "-", ":"]

    def content() -> str:
        found = "".join(pick.choices(pieces, k=pick.randint(1, 8)))
        return found if found.strip() else found + "a"

    return [[content() for _ in range(2 * pick.randint(1, 3))] for _ in range(count)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", FORMATS)
def test_parts_found_in_the_template(name: str, kind: str) -> None:
    """Conversations have one or more turns, whose contents repeat the parts' words, begin and end with newlines."""
    made = get_chat_template(copy.deepcopy(TOKENIZERS[kind]()), name)
    label = train_on_responses_only(None, tokenizer=made, return_function=True)
    for contents in [*CONTENTS, *random_contents(20)]:
        messages = conversation(contents)
        text = made.apply_chat_template(messages, tokenize=False, date_string="1 Jan 2024")
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert label({"input_ids": ids})["labels"] == responses_by_hand(made, messages)


@pytest.mark.parametrize("size", [1, 2])
def test_tensors_have_the_labels_of_lists(size: int) -> None:
    """A tensor holds one row, or rows of one length, as a tokenizer or a formatted data set returns them."""
    label = ResponseLabels(((3, 4),), ((5,),))
    rows = {"input_ids": [[3, 4, 8, 5, 9, 7], [5, 8, 3, 4, 5, 9]][:size]}
    expected = [[-100, -100, -100, -100, 9, 7], [-100, 8, -100, -100, -100, 9]][:size]
    assert label(rows) == {"labels": expected}
    found = label({"input_ids": torch.tensor(rows["input_ids"], dtype=torch.int32)})["labels"]
    assert isinstance(found, torch.Tensor) and found.dtype == torch.int64 and found.tolist() == expected
    assert label({"input_ids": np.array(rows["input_ids"])}) == {"labels": expected}
    several = label({"input_ids": list(map(torch.tensor, rows["input_ids"]))})["labels"]
    assert [row.tolist() for row in several] == expected
    assert label({"input_ids": torch.tensor(rows["input_ids"][0])})["labels"].tolist() == expected[0]
    data = Dataset.from_dict(rows | {"completion_mask": [[1] * 5 + [0]] * size, "seq_lengths": [[4, 2]] * size})
    wanted = data.map(label, batched=True)["labels"][:]
    assert wanted[0] == [-100] * 6 and wanted[1:] == [[-100, 8, -100, -100, -100, -100]][: size - 1]
    for kind in ("torch", "numpy"):
        for batched in (True, False):
            made = data.with_format(kind).map(label, batched=batched)
            assert made.with_format(None)["labels"][:] == wanted


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("chatml", ("<|im_start|>user\n", "<|im_start|>assistant\n")),
        ("qwen3", ("<|im_start|>user\n", "<|im_start|>assistant\n")),
        ("qwen3-thinking", ("<|im_start|>user\n", "<|im_start|>assistant\n")),
        ("gemma-3", ("<start_of_turn>user\n", "<start_of_turn>model\n")),
        ("phi-4", ("<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>")),
        ("phi-3", ("<|user|>\n", "<|assistant|>\n")),
        ("mistral", ("[INST] ", " [/INST]")),
        ("llama", ("<s>[INST] ", " [/INST] ")),
        ("zephyr", ("<|user|>\n", "<|assistant|>\n")),
        ("vicuna", ("USER: ", "ASSISTANT:")),
        ("alpaca", ("\n\n### Instruction:\n", "\n\n### Response:\n")),
        (
            "llama-3.1",
            ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ),
    ],
)
def test_the_parts(name: str, parts: tuple[str, str]) -> None:
    assert find_parts(get_chat_template(copy.deepcopy(byte_level()), name)) == parts


def test_a_template_that_ends_with_an_end_token() -> None:
    """That of Phi 3's repository does, where add_generation_prompt is False."""
    made = get_chat_template(copy.deepcopy(byte_level()), "phi-3", map_eos_token=False)
    made.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert find_parts(made) == ("<|user|>\n", "<|assistant|>\n")


def test_no_template_and_no_parts() -> None:
    with pytest.raises(
        ValueError, match="instruction_part, response_part: got None, and the tokenizer has no chat temp"
    ):
        train_on_responses_only(None, tokenizer=byte_level(), return_function=True)
    made = copy.deepcopy(byte_level())
    made.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match=r"could not be found in the tokenizer's chat template \(no\); allowed: the"):
        train_on_responses_only(None, tokenizer=made, return_function=True)


@pytest.mark.parametrize("name", ["instruction_part", "response_part"])
def test_a_part_that_is_empty(name: str) -> None:
    options: dict[str, Any] = {"instruction_part": "a", "response_part": "b"} | {name: ""}
    with pytest.raises(ValueError, match=f"{name}: got ''; allowed: a text, or None"):
        train_on_responses_only(None, tokenizer=byte_level(), return_function=True, **options)


def test_whitespace_of_the_parts_matches_where_it_must() -> None:
    made = byte_level()
    ids = made("### Response: 3", add_special_tokens=False)["input_ids"]
    exact, loose = (
        train_on_responses_only(
            None, "### Instruction:\n", "### Response:\n", force_match=force, tokenizer=made, return_function=True
        )
        for force in (True, False)
    )
    assert set(exact({"input_ids": ids})["labels"]) == {-100}
    assert made.decode([x for x in loose({"input_ids": ids})["labels"] if x >= 0]).strip() == "3"


# Masks of rows: 1 begins what a user says, 2 a response.
ROWS: list[tuple[list[int], list[int] | None, str]] = [
    ([5, 1, 6, 2, 7, 8, 1, 9, 2, 4], None, "----++---+"),
    ([1, 6, 7], None, "---"),
    ([2, 6, 2, 7], None, "-+-+"),
    ([6, 7, 2], None, "---"),
    ([1, 2, 1, 2], None, "----"),
    ([2, 5, 6, 7], [2, 2], "-+--"),
    ([1, 2, 5, 6, 2, 7, 1, 8], [4, 4], "--++-+--"),
    ([2, 5, 6, 7], [2], "-+--"),
    ([2, 1, 5], [1, 2], "---"),
    ([2, 5], [0, 2, 0], "-+"),
    ([], None, ""),
]


@pytest.mark.parametrize(("ids", "lengths", "expected"), ROWS)
def test_masks_of_rows(ids: list[int], lengths: list[int] | None, expected: str) -> None:
    label = ResponseLabels(((1,),), ((2,),))
    row = {"input_ids": ids} | ({} if lengths is None else {"seq_lengths": lengths})
    found = label(row)["labels"]
    assert found == [token if mark == "+" else -100 for token, mark in zip(ids, expected, strict=True)]
    batch = {name: [value, value] for name, value in row.items()}
    assert label(batch)["labels"] == [found, found]


@pytest.mark.parametrize(
    ("ids", "lengths", "expected"),
    [
        ([5, 1, 6, 2, 7, 8, 1, 9, 2, 4], None, "---------+"),
        ([2, 6, 2, 7, 7, 1, 5], None, "---++--"),
        ([2, 6, 2], None, "-+-"),
        ([1, 2, 5, 2, 6, 2, 7, 2, 8, 1], [5, 5], "----+---+-"),
        ([2, 5, 1, 6, 2, 7], [2, 2], "-+---+"),
        ([6, 7], None, "--"),
        ([], None, ""),
    ],
)
def test_the_last_response_of_each_document_alone(ids: list[int], lengths: list[int] | None, expected: str) -> None:
    label = ResponseLabels(((1,),), ((2,),), last_only=True)
    found = label({"input_ids": ids} | ({} if lengths is None else {"seq_lengths": lengths}))["labels"]
    assert found == [token if mark == "+" else -100 for token, mark in zip(ids, expected, strict=True)]


def test_only_the_last_answer_of_a_conversation_is_a_target() -> None:
    made = get_chat_template(copy.deepcopy(byte_level()), "chatml")
    messages = conversation(CONTENTS[1])
    ids = made(made.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    options: dict[str, Any] = {"tokenizer": made, "return_function": True}
    every, last = (
        train_on_responses_only(None, last_response_only=only, **options)({"input_ids": ids})["labels"]
        for only in (False, True)
    )
    assert every == responses_by_hand(made, messages)
    begin = max(index for index in range(1, len(ids)) if every[index] >= 0 > every[index - 1])
    assert last == [-100] * begin + every[begin:]
    assert made.decode(ids[begin:]).startswith(CONTENTS[1][-1])
    with pytest.raises(ValueError, match="last_response_only: got 'yes'; allowed: True, False"):
        train_on_responses_only(None, last_response_only="yes", **options)  # type: ignore[arg-type]


def test_a_part_does_not_match_across_documents() -> None:
    label = ResponseLabels(((1, 1),), ((2, 3),))
    assert label({"input_ids": [2, 3, 4], "seq_lengths": [1, 2]})["labels"] == [-100] * 3
    assert label({"input_ids": [2, 3, 4], "seq_lengths": [3]})["labels"] == [-100, -100, 4]


def test_labels_and_masks_of_the_row_are_kept() -> None:
    label = ResponseLabels(((1,),), ((2,),))
    assert label({"input_ids": [2, 5, 6], "labels": [2, -100, 6]})["labels"] == [-100, -100, 6]
    assert label({"input_ids": [2, 5, 6], "completion_mask": [0, 0, 1]})["labels"] == [-100, -100, 6]
    assert label({"input_ids": [2, 5, 6], "assistant_masks": [1, 1, 0]})["labels"] == [-100, 5, -100]


@pytest.mark.parametrize("seed", range(5))
def test_masks_of_random_rows(seed: int) -> None:
    """They agree with a loop over the tokens, for parts of several tokens and forms, in packed rows."""
    generator = np.random.default_rng(seed)
    instruction, response = ((1, 1), (1, 2)), ((1,), (2, 1), (2, 1, 1))
    label = ResponseLabels(instruction, response)
    for _ in range(200):
        lengths = generator.integers(0, 9, 4).tolist()
        ids = generator.integers(1, 4, sum(lengths)).tolist()
        expected, start = [], 0
        for length in lengths:
            expected += by_loop(ids[start : start + length], instruction, response)
            start += length
        assert label.mask(np.array(ids, np.int64), lengths).tolist() == expected


def by_loop(ids: list[int], instruction: Any, response: Any) -> list[bool]:
    mask, trains, begin = [], False, -1
    for index in range(len(ids)):
        asked, answered = (
            max((len(form) for form in forms if tuple(ids[index : index + len(form)]) == form), default=0)
            for forms in (instruction, response)
        )
        if index == begin:
            trains = True
        if asked or answered:
            trains = False
        if answered >= max(asked, 1):
            begin = index + answered
        mask.append(trains)
    return mask


def test_forms_of_a_part() -> None:
    """Each is a slice of the tokens of a text with the part in it, and none takes in a neighbour."""
    made = byte_level()
    for part in ("<|im_start|>assistant\n", "\n\n### Response:\n", " [/INST] ", "USER: "):
        forms = forms_of(part, made)
        assert forms
        for form in forms:
            assert made.decode(form).strip() == part.strip()

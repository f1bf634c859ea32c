"""Training on responses only: the labels are those masked by hand, and so is the loss."""

import copy
import logging
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.trainer.runs import BATCHINGS, SGD, TRL_DROPS_LABELS, arguments, textbook
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments
from unsloth_fast.chat_templates import CHAT_TEMPLATES, get_chat_template, train_on_responses_only
from unsloth_fast.chat_templates.parts import find_parts
from unsloth_fast.data.responses import ResponseLabels, forms_of

pytestmark = pytest.mark.filterwarnings("ignore")

SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"]
SPECIALS += ["<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|im_sep|>", "<|end|>", "<|end_of_turn|>"]
CORPUS = [
    "Why is the sky blue? The sky is blue.\n\nBecause of the air.\n- One.\n- Two.\n\n\n### Instruction:\nAdd 1 and 2.",
    "### Response:\n3.\n\n### Human: Who are you? ### Assistant: A model. USER: Hi ASSISTANT: Hello user, assistant",
    "[INST] Count to 3 [/INST] 1 2 3\nuser\nmodel\nassistant\nsystem\n>>> User: a\n>>> Assistant: b GPT4 Correct: c",
] * 4


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Merges across letters, punctuation and newlines, as those of Llama 3, Qwen and Phi 4 do."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=460, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    return finished(built)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A space begins each word and merges with it, as in those of Llama 2, Mistral and Gemma."""
    built = Tokenizer(models.BPE(byte_fallback=False, fuse_unk=True, unk_token="</s>"))
    lines = pre_tokenizers.Split("\n", "isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="first")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    built.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIALS, initial_alphabet=list("zq0456789"))
    )
    return finished(built)


def finished(built: Tokenizer) -> PreTrainedTokenizerFast:
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": SPECIALS[3:]})
    return made


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
    """Single and several turns, whose contents repeat the words of the parts, begin and end with newlines."""
    made = get_chat_template(copy.deepcopy(TOKENIZERS[kind]()), name)
    label = train_on_responses_only(None, tokenizer=made, return_function=True)
    for contents in [*CONTENTS, *random_contents(20)]:
        messages = conversation(contents)
        text = made.apply_chat_template(messages, tokenize=False, date_string="1 Jan 2024")
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert label({"input_ids": ids})["labels"] == responses_by_hand(made, messages)


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
    """As that of Phi 3's repository does, where add_generation_prompt is False."""
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
    """Compared with a loop over the tokens, for parts of several tokens and forms, in packed rows."""
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


# In a trainer


def words() -> PreTrainedTokenizerFast:
    """`tiny.tokenizer`, and a template in which w1 begins what a user says and w2 a response."""
    made = tiny.tokenizer()
    made.chat_template = (
        "{% for message in messages %}{{ 'w1 ' if message['role'] == 'user' else 'w2 ' }}"
        "{{ message['content'] }}{{ ' <eos> ' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
    )
    return made


PARTS = ("w1", "w2")


def texts(count: int = 18) -> list[str]:
    """Written conversations of one to three turns; the contents have none of the parts' words."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        turns = []
        for _ in range(1 + index % 3):
            for part in PARTS:
                size = int(torch.randint(1, 4, (1,), generator=generator))
                inside = [f"w{i}" for i in torch.randint(3, 45, (size,), generator=generator).tolist()]
                turns += [part, *inside]
            turns.append("<eos>")
        found.append(" ".join(turns))
    return found


def masked_by_hand(ids: list[int]) -> list[int]:
    """w1 and w2 are the tokens 4 and 5."""
    labels, trains = [], False
    for token in ids:
        labels.append(token if trains and token not in (4, 5) else -100)
        trains = {4: False, 5: True}.get(token, trains)
    return labels


def tokenized(rows: list[str]) -> Dataset:
    ids = [words()(row)["input_ids"] for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": [masked_by_hand(row) for row in ids]})


def trainer_of(kind: type, folder: Path, data: Any, **options: Any) -> Any:
    settings = options.pop("settings", {})
    args = arguments(folder, SFTConfig if kind is SFTTrainer else UnslothTrainingArguments, **settings)
    return kind(
        model=options.pop("model", None) or tiny.model(dtype=torch.float64),
        args=args,
        train_dataset=data,
        processing_class=words(),
        **options,
    )


def documents(dataset: Any) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens and labels of each document, packed or not."""
    for row in dataset:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            yield row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("given", [True, False])
def test_the_data_sets_of_a_trainer(given: bool, batching: str, streamed: bool, tmp_path: Path) -> None:
    if TRL_DROPS_LABELS and streamed and batching == "packed":
        pytest.skip("the installed trl packs the tokens of a stream without their labels")
    data = Dataset.from_dict({"text": texts()})
    other = Dataset.from_dict({"text": texts(5)})
    if streamed:
        data = data.to_iterable_dataset()
    settings = BATCHINGS[batching] | {"max_length": 32}
    evaluated = {"one": other, "two": other.to_iterable_dataset() if streamed else other}
    trainer = trainer_of(UnslothTrainer, tmp_path, data, eval_dataset=evaluated, settings=settings)
    collator = trainer.data_collator
    assert train_on_responses_only(trainer, *(PARTS if given else ())) is trainer
    assert trainer.data_collator is collator
    sets = [(trainer.train_dataset, 18), (trainer.eval_dataset["one"], 5), (trainer.eval_dataset["two"], 5)]
    for dataset, count in sets:
        found = list(documents(dataset))
        assert len(found) == count
        for ids, labels in found:
            assert labels == masked_by_hand(ids)
    assert isinstance(trainer.train_dataset, IterableDataset) == streamed


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("streamed", [False, True])
def test_losses_and_weights_equal_those_of_trl_with_masks_by_hand(
    batching: str, streamed: bool, tmp_path: Path
) -> None:
    """Six steps in float64, against TRL's trainer, a textbook loss, and labels masked by hand."""
    if TRL_DROPS_LABELS and (streamed or batching == "packed"):
        pytest.skip("the installed trl packs tokens without their labels, and makes those of a stream in its collator")
    plain = SGD | {"max_steps": 6, "learning_rate": 0.1}
    if batching == "packed":
        plain |= {"packing": True, "max_length": 32}
    given, masked = Dataset.from_dict({"text": texts()}), tokenized(texts())
    if streamed:
        given, masked = given.to_iterable_dataset(), masked.to_iterable_dataset()
    with tiny.KeepFloat64():
        theirs = trainer_of(SFTTrainer, tmp_path / "1", masked, settings=plain, compute_loss_func=textbook)
        theirs.train()
        ours = trainer_of(UnslothTrainer, tmp_path / "2", given, settings=plain | BATCHINGS[batching])
        train_on_responses_only(ours, *PARTS).train()
    losses, expected = ([entry["loss"] for entry in one.state.log_history[:-1]] for one in (ours, theirs))
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=1e-9)
    weights = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-7, atol=1e-9)


def test_trls_own_trainer(tmp_path: Path) -> None:
    trainer = trainer_of(SFTTrainer, tmp_path, Dataset.from_dict({"text": texts()}))
    train_on_responses_only(trainer)
    for ids, labels in documents(trainer.train_dataset):
        assert labels == masked_by_hand(ids)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["labels"].tolist()[0] == trainer.train_dataset[0]["labels"]


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_without_a_response(streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dropped, and counted in the log; those that max_length cut off as well."""
    rows: Any = Dataset.from_dict({"text": [*texts(3), "w1 w7 w8", "w1 " + "w9 " * 40 + "w2 w3"]})
    trainer = trainer_of(
        UnslothTrainer, tmp_path, rows.to_iterable_dataset() if streamed else rows, settings={"max_length": 32}
    )
    train_on_responses_only(trainer)
    assert len(list(trainer.train_dataset)) == 3
    if not streamed:
        message = "train_dataset: 2 of 5 rows have no response after response_part='w2 ', or max_length cut it off"
        assert message in caplog.text


@pytest.mark.parametrize("streamed", [False, True])
def test_no_response_at_all(streamed: bool, tmp_path: Path) -> None:
    rows: Any = Dataset.from_dict({"text": texts(4)})
    trainer = trainer_of(UnslothTrainer, tmp_path, rows.to_iterable_dataset() if streamed else rows)
    message = "train_dataset: got no response after response_part='<unk> w2' in 4 rows, the first of which begins 'w1"
    with pytest.raises(ValueError, match=message):
        train_on_responses_only(trainer, "w1", "<unk> w2")


@pytest.mark.parametrize("streamed", [False, True])
def test_an_instruction_part_that_does_not_occur(
    streamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: Any = Dataset.from_dict({"text": texts(4)})
    trainer = trainer_of(UnslothTrainer, tmp_path, rows.to_iterable_dataset() if streamed else rows)
    train_on_responses_only(trainer, "<unk> w1", "w2")
    assert "train_dataset: instruction_part='<unk> w1' does not occur: each response extends to the next" in caplog.text


def test_a_data_set_that_is_not_tokenized() -> None:
    class Trainer:
        processing_class = words()
        train_dataset = Dataset.from_dict({"text": ["w1"]})
        eval_dataset = None

    message = "train_dataset: got only the columns 'text'; allowed: rows of tokens in 'input_ids'"
    with pytest.raises(ValueError, match=message):
        train_on_responses_only(Trainer())


def test_a_collator_that_keeps_labels(tmp_path: Path) -> None:
    collator = DataCollatorForSeq2Seq(words())
    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}), data_collator=collator)
    train_on_responses_only(trainer)
    assert trainer.data_collator is collator


def test_a_collator_that_makes_labels_of_all_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collator = DataCollatorForLanguageModeling(words(), mlm=False)
    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}), data_collator=collator)
    train_on_responses_only(trainer)
    assert "DataCollatorForLanguageModeling makes labels of all tokens and is replaced" in caplog.text
    rows = [trainer.train_dataset[index] for index in range(2)]
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    labels = trainer.data_collator(rows)["labels"]
    assert (labels != -100).sum() == sum(label != -100 for row in rows for label in row["labels"])


def test_another_collator_that_does(tmp_path: Path) -> None:
    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([row["input_ids"][:3] for row in rows])
        return {"input_ids": ids, "labels": ids.expand(20, -1)}

    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}), data_collator=collator)
    with pytest.raises(
        ValueError, match="data_collator: got function, which makes labels of other tokens than the row"
    ):
        train_on_responses_only(trainer)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_that_cuts_documents(strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No token outside a response is a target; a warning says that some inside are none."""
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 16}
    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}), settings=settings)
    train_on_responses_only(trainer)
    assert (f"packing_strategy: got {strategy!r}, which cuts documents" in caplog.text) == (strategy != "bfd")
    for ids, labels in documents(trainer.train_dataset):
        if strategy != "wrapped":  # in whose rows one response may follow another's end
            assert labels == masked_by_hand(ids)
        assert not {4, 5} & set(labels)


def test_several_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    trainer = trainer_of(UnslothTrainer, tmp_path, Dataset.from_dict({"text": texts()}))
    train_on_responses_only(trainer, *PARTS, num_proc=2)
    for ids, labels in documents(trainer.train_dataset):
        assert labels == masked_by_hand(ids)

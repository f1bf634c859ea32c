"""Trainers train on the tokens of the text that a script prints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.data.test_nulls import CHATS as CALLS
from tests.data.test_nulls import TOOLS, tokenizer
from tests.data.test_text import CHATS, SHAREGPT, chatml, plain
from tests.trainer.runs import BATCHINGS, arguments
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments
from unsloth_fast.chat_templates import train_on_responses_only
from unsloth_fast.compat import patch_trl

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [(name, streamed) for name in BATCHINGS for streamed in (False, True)]


def documents(trainer: Any) -> list[list[int]]:
    """The documents of the training rows, packed or not."""
    found = []
    for row in trainer.train_dataset:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            found.append(row["input_ids"][start : start + length])
            start += length
    return found


def built(kind: type, folder: Path, made: Any, data: Any, batching: str, **options: Any) -> Any:
    """A trainer; `patched` is TRL's own class, called as older scripts call it."""
    options = {"max_length": 1024} | BATCHINGS[batching] | options
    model = tiny.model(vocab_size=len(made))
    if kind is UnslothTrainer:
        return kind(model, arguments(folder, **options), train_dataset=data, processing_class=made)
    patch_trl()
    field = {"dataset_text_field": "text"} if "text" in next(iter(data)) else {}
    args = arguments(folder, SFTConfig, **options)
    return kind(model=model, tokenizer=made, train_dataset=data, max_seq_length=1024, args=args, **field)


@pytest.mark.parametrize("kind", [UnslothTrainer, SFTTrainer])
@pytest.mark.parametrize(("batching", "streamed"), CASES)
def test_the_printed_text(batching: str, streamed: bool, kind: type, tmp_path: Path) -> None:
    """It stands beside conversations, and has a begin token and a turn's end of its own."""
    made = chatml("{{ bos_token }}")
    texts = [made.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    data = Dataset.from_dict({"text": texts, "conversations": SHAREGPT, "messages": CHATS})
    trainer = built(kind, tmp_path, made, data.to_iterable_dataset() if streamed else data, batching)
    assert sorted(documents(trainer)) == sorted(plain(made, text) for text in texts)


@pytest.mark.parametrize("kind", [UnslothTrainer, SFTTrainer])
@pytest.mark.parametrize(("batching", "streamed"), CASES)
def test_tool_calls(batching: str, streamed: bool, kind: type, tmp_path: Path) -> None:
    """They are as the template writes the user's own objects."""
    made = tokenizer()
    # TRL 0.24 cannot truncate a stream with a null in a column of lists.
    rows = [{"messages": chat, "tools": tools or []} for chat, tools in zip(CALLS, TOOLS, strict=True)]
    data = Dataset.from_list(rows)
    trainer = built(kind, tmp_path, made, data.to_iterable_dataset() if streamed else data, batching)
    expected = [made.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) for row in rows]
    assert sorted(documents(trainer)) == sorted(plain(made, text) for text in expected)


@pytest.mark.parametrize("how", ["assistant only", "responses only"])
def test_tool_calls_of_the_assistant_alone(how: str, tmp_path: Path) -> None:
    made = tokenizer(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% generation %}{{ message['content'] }}"
        "{% for call in message['tool_calls'] or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
        "<|im_end|>{% endgeneration %}{% endfor %}"
    )
    data = Dataset.from_list([{"messages": chat} for chat in CALLS])
    only = how == "assistant only"
    trainer = built(UnslothTrainer, tmp_path, made, data, "padded", assistant_only_loss=only)
    if not only:
        train_on_responses_only(trainer, "<|im_start|>user\n", "<|im_start|>assistant\n")
    answers = [
        made.decode([label for label in row["labels"] if label != -100]).replace("Hi<|im_end|>", "")
        for row in trainer.train_dataset
    ]
    assert answers == [
        '{"city": "Paris", "units": ["C", null]}<|im_end|>',
        '{"a": 1, "b": {"x": 2}}<|im_end|>',
        "{}<|im_end|>",
    ]


def targets(trainer: Any, rows: list[Any], tokenizer: Any) -> list[str]:
    """The words of the rows that are trained on. Before they are collated, some releases of TRL have a mask of them."""
    labels = torch.cat([trainer.data_collator([row])["labels"].flatten() for row in rows])
    return tokenizer.decode(labels[labels != -100]).split()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("column", ["messages", "conversations", "of ShareGPT", "messages of ShareGPT"])
def test_the_assistant_alone_in_any_column(column: str, streamed: bool, packing: bool, tmp_path: Path) -> None:
    """Columns that are not read may stand beside it; it may begin with an empty conversation, or be evaluated on."""
    made = tiny.tokenizer()
    made.chat_template = (
        "{% for m in messages %}w1 {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %} "
        "{% endif %}{% endfor %}"
    )
    keys = ("from", "value") if column.endswith("of ShareGPT") else ("role", "content")
    turns = [[("user", "w5"), ("assistant", "w6 w7")], [], [("user", "w5"), ("assistant", "w8")]]
    chats = [[dict(zip(keys, turn, strict=True)) for turn in chat] for chat in turns]
    name = "messages" if column.startswith("messages") else "conversations"
    given = Dataset.from_dict({name: [[], *chats], "prompt": ["w9"] * 4, "text": ["w9"] * 4})
    if name == "conversations":
        given = given.add_column("messages", [None] * 4)
    data: Any = given.to_iterable_dataset() if streamed else given
    args = arguments(tmp_path, assistant_only_loss=True, packing=packing, max_length=8)
    evaluated = {"a": data, "b": given}
    trainer = UnslothTrainer(tiny.model(), args, train_dataset=data, eval_dataset=evaluated, processing_class=made)
    rows = [list(trainer.train_dataset), *map(list, trainer.eval_dataset.values())]
    for part in rows:
        assert sorted(targets(trainer, part, made)) == ["w6", "w7", "w8"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_and_a_completion_in_the_keys_of_sharegpt(streamed: bool, tmp_path: Path) -> None:
    """They are trained on as in standard keys; the messages that were given do not change."""
    made, standard = chatml(), [("role", "content")] * 2
    rows: list[list[Any]] = []
    trained: list[list[str]] = []
    for keys in (standard, [("from", "value")] * 2, [("from", "value"), ("role", "content")]):
        turns = ("prompt", "user", "Hi"), ("completion", "assistant", "Hello")
        row = {name: [dict(zip(key, turn, strict=True))] for key, (name, *turn) in zip(keys, turns, strict=True)}
        own = [row, row]
        data: Any = IterableDataset.from_generator(lambda own=own: iter(own)) if streamed else Dataset.from_list(own)
        trainer = built(UnslothTrainer, tmp_path, made, data, "padded", max_steps=1)
        rows.append(list(trainer.train_dataset))
        trained.append(targets(trainer, rows[-1], made))
        assert all({*row[name][0]} == {*key} for name, key in zip(row, keys, strict=True))
    assert rows[0] == rows[1] == rows[2]
    assert trained[0] == trained[1] == trained[2] and 0 < len(trained[0]) < sum(
        len(row["input_ids"]) for row in rows[0]
    )


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_named_text_beside_a_prompt_and_a_completion(by_keyword: bool, tmp_path: Path) -> None:
    made = chatml()
    data = Dataset.from_dict({"text": ["Hi"], "prompt": ["a"], "completion": ["b"]})
    field = {"dataset_text_field": "text"}
    args = arguments(tmp_path, UnslothTrainingArguments, **({} if by_keyword else field))
    options: dict[str, Any] = {"train_dataset": data, "processing_class": made} | (field if by_keyword else {})
    trainer = UnslothTrainer(tiny.model(vocab_size=len(made)), args, **options)
    (row,) = trainer.train_dataset
    assert row["input_ids"] == row["labels"] == [1, *plain(made, "Hi<|im_end|>")]


@pytest.mark.parametrize("kind", [UnslothTrainer, SFTTrainer])
def test_a_formatting_func_of_a_batch(kind: type, tmp_path: Path) -> None:
    made = chatml()
    data = Dataset.from_dict({"instruction": ["Add", "Count"], "output": ["3", "1 2"], "messages": CHATS})

    def formatting_prompts_func(examples: Any) -> list[str]:
        pairs = zip(examples["instruction"], examples["output"], strict=False)
        return [f"{instruction}: {output}" for instruction, output in pairs]

    patch_trl()
    model, args = tiny.model(vocab_size=len(made)), arguments(tmp_path)
    trainer = kind(model=model, args=args, train_dataset=data, tokenizer=made, formatting_func=formatting_prompts_func)
    assert documents(trainer) == [[1, *plain(made, f"{text}<|im_end|>")] for text in ("Add: 3", "Count: 1 2")]


def test_the_tokenizer_is_checked_before_the_data(tmp_path: Path) -> None:
    made = chatml()
    made.chat_template = None
    with pytest.raises(ValueError, match=r"^processing_class: got a tokenizer without chat_template"):
        built(UnslothTrainer, tmp_path, made, Dataset.from_dict({"messages": CHATS}), "padded")


@pytest.mark.parametrize("name", ["image", "images", "videos", "audio"])
def test_a_column_of_media_without_any_value_counts_as_absent(name: str, tmp_path: Path) -> None:
    made = tiny.tokenizer()
    data = Dataset.from_dict({"text": ["w1 w2", "w3"], name: [None, None]})
    options = {"eval_dataset": {"a": data}, "processing_class": made}
    trainer = UnslothTrainer(tiny.model(), arguments(tmp_path), train_dataset=data, **options)
    assert documents(trainer) == [plain(made, text) for text in ("w1 w2<eos>", "w3<eos>")]
    assert name not in trainer.eval_dataset["a"].column_names


@pytest.mark.parametrize("options", [{}, {"dataset_kwargs": {"skip_prepare_dataset": True}}])
@pytest.mark.parametrize("streamed", [False, True])
def test_images_for_a_model_of_text_are_refused(streamed: bool, options: dict[str, Any], tmp_path: Path) -> None:
    """They are refused also in a data set to evaluate on; of other media the text is trained on."""
    text, given = Dataset.from_dict({"text": ["w1 w2", "w3"]}), {"processing_class": tiny.tokenizer()}
    args = arguments(tmp_path, **options)
    for name, key in (("image", "train_dataset"), ("images", "train_dataset"), ("images", "eval_dataset")):
        data: Any = text.add_column(name, ["a", "b"])
        rows = text.add_column("input_ids", [[3, 4]] * 2) if options else text
        data = {"train_dataset": rows} | {key: data.to_iterable_dataset() if streamed else data}
        words = f"^{key}: got the column '{name}' for a model or a tokenizer of text alone; allowed: columns of text"
        with pytest.raises(ValueError, match=words):
            UnslothTrainer(tiny.model(), args, **data, **given)
    if not options:
        data = text.rename_column("text", "words").add_column("audio", ["a", "b"])
        data = data.to_iterable_dataset() if streamed else data
        with pytest.raises(ValueError, match="train_dataset: got no column 'text', only 'words', 'audio'"):
            UnslothTrainer(tiny.model(), args, train_dataset=data, **given)
        UnslothTrainer(tiny.model(), args, train_dataset=data, dataset_text_field="words", **given)

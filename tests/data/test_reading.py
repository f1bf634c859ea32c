"""The columns that are read: the text alone is trained on, whatever other columns are called."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from trl import SFTConfig, SFTTrainer

from tests.data.samples import SKIP, ids, labelled, stream, text, tokens, trainer_on
from tests.trainer.runs import TRL_DROPS_LABELS
from unsloth_fast.data.columns import check_text
from unsloth_fast.data.reading import read_columns

TEXTS = {"text": ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]}
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
CHATS = {"messages": [CHAT, CHAT[:1], CHAT]}
PAIRS = {"prompt": ["w1", "w2", "w3"], "completion": ["w4", "w5", "w6"]}
ANY = [None] * 3

BESIDE: list[dict[str, Any]] = [
    {"labels": [0, 1, 0]},
    {"labels": ["good", "bad", "good"]},
    {"labels": [[0, 1], [1], [0]]},
    {"labels": [[3, 4, 5, 1], [6, 7, 1], [8, 9, 10, 11, 1]]},  # as many as tokens
    {"labels": [0.5, 1.0, 0.0]},
    {"labels": ANY},
    {"prompt": PAIRS["prompt"]},
    {"completion": PAIRS["completion"]},
    {"prompt": CHATS["messages"], "chosen": CHATS["messages"], "rejected": CHATS["messages"]},
    {"prompt": ANY, "completion": ANY},
    {"messages": ANY, "conversations": ["w1", "w2", "w3"]},
    {"input_ids": ANY},
    {"tools": ANY, "chat_template_kwargs": ANY},
    {"tools": [1, 2, 3], "chat_template_kwargs": ["a", "b", "c"]},
    {"seq_lengths": [[3], [2], [4]], "completion_mask": [[1], [1], [1]], "assistant_masks": [[0], [0], [0]]},
    {"attention_mask": [[1, 1, 1]] * 3, "position_ids": [[0], [0], [0]]},
]


def read(data: Any) -> list[dict[str, Any]]:
    """The rows of the columns that are read."""
    columns = check_text(data, "train data set", next(iter(data)), SFTConfig(bf16=False))
    return [dict(row) for row in read_columns(data, "train data set", columns, "text")]


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: ", ".join(beside))
@pytest.mark.parametrize("streamed", [False, True])
def test_columns_beside_the_text_are_not_read(
    beside: dict[str, Any], streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names those with values; columns without a meaning to the trainer stay."""
    data = Dataset.from_dict(TEXTS | beside | {"id": [1, 2, 3]})
    expected = Dataset.from_dict(TEXTS | {"id": [1, 2, 3]}).to_list()
    assert read(stream(data) if streamed else data) == expected
    names = ", ".join(repr(name) for name in sorted(beside) if beside[name] is not ANY)
    lines = [f"train data set: trained on 'text'; not read: {names}"] * bool(names)
    assert [record.message for record in caplog.records] == lines


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("columns", "beside"),
    [
        (CHATS, {"prompt": PAIRS["prompt"], "labels": [0, 1, 0]}),
        (CHATS, {"completion": PAIRS["completion"], "text": [[1], [2], [3]]}),
        (TEXTS, {"messages": [None, CHAT, CHAT]}),
        (PAIRS, {"messages": ANY, "text": TEXTS["text"], "labels": [0, 1, 0], "tools": [1, 2, 3]}),
        ({"input_ids": [[3], [4], [5]], "labels": [[3], [4], [5]], "text": ANY}, {}),
    ],
)
def test_columns_beside_other_layouts_are_not_read(
    columns: dict[str, Any], beside: dict[str, Any], streamed: bool
) -> None:
    data = Dataset.from_dict(columns | beside)
    assert read(stream(data) if streamed else data) == Dataset.from_dict(columns).to_list()


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_without_a_message_are_dropped(streamed: bool, caplog: pytest.LogCaptureFixture) -> None:
    data = Dataset.from_dict({"messages": [[], CHAT, []]})
    assert [row["messages"] for row in read(stream(data) if streamed else data)] == [CHAT]
    assert f"rows without a message are dropped{' as they are read' if streamed else ': 2 of 3'}" in caplog.text
    none = Dataset.from_dict({"messages": [[], []]})
    with pytest.raises(ValueError, match=r"got no message in (2 rows|any row); allowed: at least one row with a mess"):
        read(stream(none) if streamed else none)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_row_without_template_variables_has_none(streamed: bool) -> None:
    """TRL unpacks a dictionary from each row."""
    data = Dataset.from_dict({"messages": [CHAT] * 2, "chat_template_kwargs": [None, {"thinking": True}]})
    first, second = read(stream(data) if streamed else data)
    assert first["chat_template_kwargs"] in ({}, {"thinking": None})  # Arrow gives all rows the same keys
    assert second["chat_template_kwargs"] == {"thinking": True}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (CHATS | {"tools": [1, 2, 3]}, "got 1 in row 0 of column 'tools'; allowed: a list, or a string of JSON in"),
        (CHATS | {"chat_template_kwargs": [*ANY[:2], "x"]}, "got 'x' in row 2 of column 'chat_template_kwargs'; allow"),
        ({"messages": ["w1"]}, "got 'w1' in row 0 of column 'messages'; allowed: a list in every row"),
        ({"prompt": ["w1"], "completion": [CHAT]}, "in row 0 of column 'completion'; allowed: a string in every row"),
        ({"prompt": [CHAT], "completion": ["w1"]}, "got 'w1' in row 0 of column 'completion'; allowed: a list in ever"),
        ({"messages": [None, CHAT, CHAT]}, "got None in row 0 of column 'messages'; allowed: a list in every row"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(Dataset.from_dict(columns))
    assert message in str(error.value)


def test_a_stream_is_checked_as_it_is_read() -> None:
    with pytest.raises(ValueError, match=r"^train data set: got None in row 1 of column 'text'; allowed: a string in"):
        read(stream(text("w1", None)))


def losses(folder: Path, data: Any, **options: Any) -> list[float]:
    trainer = trainer_on(folder, data, max_steps=3, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def formatted(row: dict[str, Any]) -> str:
    return f"{row['body']} {row['prompt']} w{row['labels'] + 3}"


HOW = {"padded": {"padding_free": False}, "packed": {"packing": True, "max_length": 16}}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_the_columns_of_a_formatting_func_are_not_trained_on(tmp_path: Path, how: str, streamed: bool) -> None:
    """The function reads all columns under their own names; the text that it returns is trained on."""
    columns = {"body": ["w1 w2", "w3"], "labels": [0, 1], "prompt": ["w5", "w6"], "seq_lengths": [[1], [1]]}
    data = Dataset.from_dict(columns | {"messages": [None, None]})
    texts = text(*map(formatted, data))
    if streamed:
        data, texts = stream(data), stream(texts)
    found = losses(tmp_path, data, formatting_func=formatted, **HOW[how])
    assert found == losses(tmp_path, texts, **HOW[how])


MODES: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False, "max_length": None},
    "padding-free": {"max_length": None},
    "packed": {"packing": True, "max_length": 16},
    "wrapped": {"packing": True, "max_length": 4, "packing_strategy": "wrapped"},
    "prepared": SKIP,
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_rows_without_a_token_change_nothing(tmp_path: Path, mode: str, streamed: bool) -> None:
    """The losses are those of the other rows, in an evaluation too."""
    if streamed and TRL_DROPS_LABELS and "packing" in MODES[mode]:
        pytest.skip("TRL before 1.7: refused")
    rows, options = labelled([3, 4, 5], [-100, 6], [7, 8, 9, 10]), {"per_device_train_batch_size": 1} | MODES[mode]
    mixed = Dataset.from_list([{"input_ids": [], "labels": []}, *rows.to_list(), {"input_ids": [], "labels": []}])
    if streamed:
        rows, mixed = stream(rows), stream(mixed)
    one, other = (
        trainer_on(tmp_path, data, eval_dataset={"a": data}, max_steps=3, **options) for data in (rows, mixed)
    )
    assert one.train().training_loss == other.train().training_loss
    assert one.evaluate()["eval_a_loss"] == other.evaluate()["eval_a_loss"]


@pytest.mark.skipif("evaluate" not in vars(SFTTrainer), reason="this TRL does not prepare what evaluate is given")
def test_an_evaluation_of_another_data_set_reads_the_same(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, tokens(3), eval_dataset=DatasetDict({"a": Dataset.from_dict(TEXTS | BESIDE[0])}))
    expected = trainer.evaluate(Dataset.from_dict(TEXTS))["eval_loss"]
    assert trainer.evaluate()["eval_a_loss"] == expected
    assert trainer.evaluate(stream(Dataset.from_dict(TEXTS | BESIDE[6])))["eval_loss"] == expected
    with pytest.raises(
        ValueError, match=r"^eval data set: got 1 in row 0 of column 'labels'; allowed: a list of integ"
    ):
        trainer.evaluate(ids([3, 4], labels=[1]))

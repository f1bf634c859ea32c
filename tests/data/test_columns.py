"""The columns of a trainer's data sets: which hold the text, and the refusal of data without any."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from trl import SFTConfig

from tests.data.samples import SKIP, ids, labelled, stream, text, tokens
from tests.trainer.runs import arguments
from unsloth_fast.data.columns import (
    check_columns,
    completion_only,
    datasets_of,
    has_media_columns,
    has_stream,
    with_rows,
)

CHAT = [{"role": "user", "content": "w1"}]
PAIR = {"prompt": ["w1", "w2"], "completion": ["w3", "w4"]}


def check(folder: Path, data: Any, vocabulary: int | None = 48, **options: Any) -> None:
    """Check this data set, and "eval_dataset" among the options; the others are arguments."""
    names = ("eval_dataset", "formatting_func")
    given = {"train_dataset": data} | {name: options.pop(name) for name in names if name in options}
    check_columns(given, arguments(folder, SFTConfig, **options), vocabulary)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (tokens(), {}, "train_dataset: got no row; allowed: at least one (check its path, split and filters)"),
        (tokens(3), {"eval_dataset": tokens()}, "eval_dataset: got no row"),
        (tokens(3), {"eval_dataset": {"a": tokens(3), "b": tokens()}}, "eval_dataset['b']: got no row"),
        (stream(tokens()), {}, "train_dataset: got no row"),
        (
            Dataset.from_dict({"body": ["w1"]}),
            {},
            "train_dataset: got no column 'text', only 'body'; allowed: 'text' (the name is dataset_text_field), "
            "'messages', 'prompt' and 'completion', or 'input_ids'",
        ),
        (Dataset.from_dict({"prompt": ["w1"]}), {}, "train_dataset: got no column 'text', only 'prompt'; allowed"),
        (text("w1"), {"dataset_text_field": "words"}, "train_dataset: got no column 'words', only 'text'; allowed"),
        (
            text("w1", None),
            {},
            "train_dataset: got None in row 1 of column 'text'; allowed: a string in every row (drop the others with "
            "the data set's `filter`)",
        ),
        (text("w1", "w2", None).select([2, 0]), {}, "train_dataset: got None in row 0 of column 'text'"),
        (text(None, None), {}, "train_dataset: got None in row 0 of column 'text'"),
        (text(1, 2), {}, "train_dataset: got 1 in row 0 of column 'text'; allowed: a string in every row"),
        (text(["w1", "w2"]), {}, "train_dataset: got ['w1', 'w2'] in row 0 of column 'text'; allowed: a string"),
        (stream(text(None)), {}, "train_dataset: got None in row 0 of column 'text'"),
        (tokens(3), {"eval_dataset": {"a": text(1.5)}}, "eval_dataset['a']: got 1.5 in row 0 of column 'text'"),
        (
            Dataset.from_dict(PAIR | {"completion": ["w3", None]}),
            {},
            "train_dataset: got None in row 1 of column 'completion'; allowed: a string or a list in every row",
        ),
        (
            Dataset.from_dict({"messages": [CHAT, None]}),
            {},
            "train_dataset: got None in row 1 of column 'messages'; allowed: a list in every row",
        ),
        (
            Dataset.from_dict({"messages": [["Hi", "Hello"]]}),
            {},
            "train_dataset: got ['Hi', 'Hello'] in row 0 of column 'messages'; allowed: a list of dictionaries with "
            "'role' and 'content' in every row",
        ),
        (
            Dataset.from_dict({"prompt": [CHAT], "completion": [[{"speaker": "a", "text": "w2"}]]}),
            {},
            "train_dataset: got [{'speaker': 'a', 'text': 'w2'}] in row 0 of column 'completion'; allowed: a list of d",
        ),
        (
            Dataset.from_dict({"conversations": [CHAT, None]}),
            {},
            "train_dataset: got None in row 1 of column 'conversations'; allowed: a list in every row",
        ),
        (
            Dataset.from_dict({"input_ids": [[3, 4], None]}),
            {},
            "train_dataset: got None in row 1 of column 'input_ids'; allowed: a list in every row",
        ),
        (labelled([-100, -100], [5]), SKIP, "train_dataset: got no target in 2 documents; allowed: at least one label"),
        (stream(labelled([-100, -100], [5])), SKIP, "train_dataset: got no target in 2 documents; allowed"),
        (tokens(3), SKIP | {"eval_dataset": {"a": labelled([5])}}, "eval_dataset['a']: got no target in 1 document"),
        (ids([3, 4], [48]), SKIP, "train_dataset: got 48 in row 1 of column 'input_ids'"),
        (text("w1"), SKIP, "train_dataset: got no column 'input_ids', only 'text'; allowed: rows with 'input_ids'"),
        (ids([3]), SKIP | {"eval_dataset": {"a": text("w1")}}, "eval_dataset['a']: got no column 'input_ids', only"),
        (stream(text("w1")), SKIP, "train_dataset: got no column 'input_ids', only 'text'"),
        (labelled([3, 4], [48]), SKIP, "train_dataset: got 48 in row 1 of column 'labels'"),
        (stream(labelled([-100, 48])), SKIP, "train_dataset: got 48 in row 0 of column 'labels'"),
    ],
)
def test_a_data_set_without_usable_columns_is_refused(
    tmp_path: Path, data: Any, options: dict[str, Any], message: str
) -> None:
    """The message names the data set, its column and row, and what to do."""
    with pytest.raises(ValueError) as error:
        check(tmp_path, data, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (tokens(3), {}),
        (text("w1"), {}),
        (Dataset.from_dict({"words": ["w1"]}), {"dataset_text_field": "words"}),
        (Dataset.from_dict(PAIR), {}),
        (Dataset.from_dict({"messages": [CHAT]}), {}),
        (Dataset.from_dict({"conversations": [CHAT]}), {}),
        (tokens(3, 4, text=["w1", None]), {}),
        (Dataset.from_dict({"text": ["w1", None, "w2"], "note": [None, "a", None]}).select([0, 2]), {}),
        (Dataset.from_dict({"body": ["w1"]}), {"formatting_func": str}),
        (Dataset.from_dict({"image": ["w1"]}), {}),
        (ids([3, 4]), SKIP),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_data_set_with_a_text_in_every_row_passes(
    tmp_path: Path, data: Dataset, options: dict[str, Any], streamed: bool
) -> None:
    """Nulls pass in rows that were filtered out, and in a column that is not read."""
    check(tmp_path, stream(data) if streamed else data, **options)


def test_rows_that_another_collator_reads_pass(tmp_path: Path) -> None:
    args = arguments(tmp_path, SFTConfig, **SKIP)
    check_columns({"train_dataset": text("w1"), "data_collator": list}, args, None)
    check_columns({"train_dataset": Dataset.from_dict({"image": ["w1"]})}, args, None)


TABLE = torch.utils.data.TensorDataset(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            {"train_dataset": DatasetDict({"train": tokens(3), "test": tokens(3)})},
            {},
            "train_dataset: got a DatasetDict of 'train', 'test'; allowed: one of them",
        ),
        ({"train_dataset": {"text": ["w1"]}}, {}, "train_dataset: got a dict of 'text'; allowed: one of them"),
        ({"train_dataset": "a.jsonl"}, {}, "train_dataset: got 'a.jsonl'; allowed: a `Dataset` or `IterableDataset`"),
        ({"train_dataset": "a.jsonl"}, SKIP, "train_dataset: got 'a.jsonl'; allowed: a `Dataset`"),
        ({"train_dataset": tokens(3), "eval_dataset": Path("a")}, {}, "eval_dataset: got PosixPath('a'); allowed: a"),
        ({"train_dataset": tokens(3), "eval_dataset": {"a": TABLE}}, {}, "eval_dataset['a']: got TensorDataset;"),
        ({"train_dataset": [{"text": "w1"}]}, {}, "train_dataset: got list; allowed: a `Dataset`"),
        ({"train_dataset": TABLE}, SKIP, "train_dataset: got rows of the type tuple; allowed: dictionaries"),
    ],
)
def test_what_is_no_data_set_is_refused(
    tmp_path: Path, given: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError) as error:
        with_rows(given, arguments(tmp_path, SFTConfig, **options))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("kind", ["pandas", "arrow", "numpy"])
@pytest.mark.parametrize("streamed", [False, True])
def test_any_format_gives_dictionaries(tmp_path: Path, kind: str, streamed: bool) -> None:
    """Each row is a dictionary of the columns that the format shows."""
    given: Any = Dataset.from_dict({"messages": [CHAT], "text": [None]})
    shown = given.to_iterable_dataset().remove_columns("text") if streamed else given
    formatted = shown.with_format(kind) if streamed else shown.with_format(kind, columns=["messages"])
    args = arguments(tmp_path, SFTConfig)
    found = with_rows({"train_dataset": formatted, "eval_dataset": {"a": formatted}}, args)
    assert [list(part) for _, part in datasets_of(found)] == [[{"messages": CHAT}]] * 2
    prepared = tokens(3).with_format("torch")
    assert with_rows({"train_dataset": prepared}, args)["train_dataset"] is prepared


def test_every_data_set_of_a_trainer_has_a_name() -> None:
    one, two = tokens(3), stream(tokens(4))
    given = {"train_dataset": one, "eval_dataset": {"a": one, "b": two}, "model": "x"}
    assert list(datasets_of(given)) == [("train_dataset", one), ("eval_dataset['a']", one), ("eval_dataset['b']", two)]
    assert list(datasets_of({"train_dataset": one, "eval_dataset": None})) == [("train_dataset", one)]
    assert list(datasets_of({})) == []


def test_one_stream_among_the_data_sets_counts() -> None:
    assert has_stream({"train_dataset": tokens(3), "eval_dataset": {"a": tokens(3), "b": stream(tokens(3))}})
    assert not has_stream({"train_dataset": tokens(3), "eval_dataset": tokens(3)})


@pytest.mark.parametrize("name", ["image", "videos", "audio", "pixel_values", "mm_token_type_ids"])
def test_columns_of_images_video_and_audio_are_recognised(name: str) -> None:
    """A stream may not know its columns, and then counts as text."""
    assert has_media_columns({"train_dataset": tokens(3), "eval_dataset": {"a": tokens(3, **{name: [0]})}})
    assert not has_media_columns({"train_dataset": tokens(3), "eval_dataset": stream(tokens(3, **{name: [0]}))})


@pytest.mark.parametrize(
    ("data", "asked", "expected"),
    [
        (Dataset.from_dict(PAIR), None, True),
        (Dataset.from_dict(PAIR), False, False),
        (Dataset.from_dict({"prompt": ["w1"]}), None, False),
        (text("w1"), None, False),
        (text("w1"), True, True),
        (None, None, False),
    ],
    ids=["pairs", "pairs, all tokens", "prompts", "texts", "texts, completions", "no data"],
)
def test_completions_alone_are_trained_on(tmp_path: Path, data: Any, asked: bool | None, expected: bool) -> None:
    """completion_only_loss asks for it; without it, a first row with a prompt and a completion does."""
    args = arguments(tmp_path, SFTConfig, completion_only_loss=asked)
    assert completion_only({"train_dataset": data}, args) == expected
    if data is not None:
        assert completion_only({"train_dataset": stream(data)}, args) == expected

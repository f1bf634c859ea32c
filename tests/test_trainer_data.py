"""From a data set to batches: what is decided, what is said, and what cannot be trained on, before the first step."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PrefixTuningConfig
from torch.utils.data import SequentialSampler
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel
from trl import SFTConfig

from tests import tiny
from tests.runs import arguments
from unsloth_fast import UnslothTrainer, packed_dataset
from unsloth_fast.optimizer import check_what_is_trained

pytestmark = pytest.mark.filterwarnings("ignore")


def tokens(*lengths: int, **columns: Any) -> Dataset:
    """Documents of these lengths, every token a target."""
    rows = [list(range(3, 3 + length)) for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows} | columns)


def masked(*rows: list[int], **columns: Any) -> Dataset:
    """Documents with these labels."""
    return Dataset.from_dict({"input_ids": [[3] * len(row) for row in rows], "labels": list(rows)} | columns)


def ids(*rows: list[int], **columns: Any) -> Dataset:
    """Documents of these tokens, without labels."""
    return Dataset.from_dict({"input_ids": list(rows)} | columns)


def stream(data: Dataset) -> IterableDataset:
    """The same rows, of which only the first can be asked for, as from a hub."""
    return IterableDataset.from_generator(lambda: iter(data.to_list()))


def text(*rows: Any) -> Dataset:
    """A column of these values."""
    return Dataset.from_dict({"text": list(rows)})


SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}
CHAT = [{"role": "user", "content": "w1"}]


def make(folder: Path, data: Any, kind: type = UnslothTrainer, **options: Any) -> Any:
    """A trainer on these data."""
    more = {
        name: options.pop(name) for name in ("model", "eval_dataset", "data_collator", "peft_config") if name in options
    }
    more = {"model": tiny.model()} | more
    return kind(args=arguments(folder, **options), train_dataset=data, processing_class=tiny.tokenizer(), **more)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (tokens(), {}, "train_dataset: got no row; allowed: at least one"),
        (Dataset.from_dict({"body": ["w1"]}), {}, "train_dataset: got no column 'text', only 'body'; allowed: 'text'"),
        (Dataset.from_dict({"prompt": ["w1"]}), {}, "train_dataset: got no column 'text', only 'prompt'; allowed"),
        (tokens(3), {"eval_dataset": tokens()}, "eval_dataset: got no row"),
        (
            tokens(3),
            {"eval_dataset": {"a": tokens(3), "b": Dataset.from_dict({"c": [1]})}},
            "eval_dataset['b']: got no",
        ),
        (tokens(1, 1), {}, "train data set: got no target in 2 documents within max_length=1024 tokens; allowed: at"),
        (tokens(1, 1), {"packing": True, "max_length": 8}, "got no target in 2 documents within max_length=8 tokens"),
        (
            masked([-100, -100], [5, -100, -100]),
            {},
            "train data set: got no target in 2 documents",
        ),
        (
            masked([-100, -100, 5]),
            {"packing": True, "max_length": 2},
            "got no target in 1 documents within max_length=2 tokens",
        ),
        (
            stream(masked([-100, -100], [5, -100, -100])),
            {},
            "train data set: got no target in 2 documents within max_length=1024 tokens; allowed: at least one label",
        ),
        (stream(masked([-100, -100, 5])), {"max_length": 2}, "got no target in 1 documents within max_length=2 tokens"),
        (stream(masked([-100] * 3)), {"packing": True, "packing_strategy": "wrapped"}, "got no target in 1 documents;"),
        pytest.param(
            masked([3, 4, -100, -100]),
            {"max_length": 2, "truncation_mode": "keep_end"},
            "got no target in 1 documents within max_length=2 tokens",
            marks=pytest.mark.skipif(not hasattr(SFTConfig, "truncation_mode"), reason="of TRL since 1.0"),
        ),
        (masked([-100, -100], [5]), SKIP, "train_dataset: got no target in 2 documents; allowed: at least one label"),
        (stream(masked([-100, -100], [5])), SKIP, "train_dataset: got no target in 2 documents; allowed"),
        (tokens(3), SKIP | {"eval_dataset": {"a": masked([5])}}, "eval_dataset['a']: got no target in 1 documents"),
        (text("w1", None), {}, "train_dataset: got None in row 1 of column 'text'; allowed: a string in every row"),
        (text("w1", "w2", None).select([2, 0]), {}, "got None in row 0 of column 'text'"),
        (text(None, None), {}, "got None in row 0 of column 'text'"),
        (text(1, 2), {}, "train_dataset: got 1 in row 0 of column 'text'; allowed: a string in every row (leave"),
        (text(["w1", "w2"]), {}, "got ['w1', 'w2'] in row 0 of column 'text'; allowed: a string"),
        (stream(text(None)), {}, "got None in row 0 of column 'text'"),
        (tokens(3), {"eval_dataset": {"a": text(1.5)}}, "eval_dataset['a']: got 1.5 in row 0 of column 'text'"),
        (
            Dataset.from_dict({"prompt": ["w1", "w2"], "completion": ["w3", None]}),
            {},
            "got None in row 1 of column 'completion'; allowed: a string or a list in every row",
        ),
        (Dataset.from_dict({"messages": [CHAT, None]}), {}, "row 1 of column 'messages'; allowed: a list in every row"),
        (
            Dataset.from_dict({"input_ids": [[3, 4], None]}),
            {},
            "got None in row 1 of column 'input_ids'; allowed: a li",
        ),
        (
            tokens(9, seq_lengths=[[4, 5]]),
            {"packing": True, "max_length": 8},
            "train data set: got a packed row of 9 tokens; allowed: up to max_length=8",
        ),
        (
            masked([-100, -100], seq_lengths=[[1, 1]]),
            {},
            "train data set: got no target in 1 documents",
        ),
        (
            tokens(3),
            {"eval_dataset": masked([-100, -100])},
            "eval data set: got no target in 1 documents",
        ),
        (tokens(3), {"eval_dataset": {"a": tokens(3), "b": tokens(1, 1)}}, "b data set: got no target in 2 documents"),
        (tokens(3), {"packing": True, "max_length": None}, "max_length: got None with packing=True; allowed"),
        (tokens(3), {"packing": True, "max_length": -3}, "max_length: got -3; allowed"),
        (tokens(3), {"max_length": 0}, "max_length: got 0; allowed"),
        (
            ids([3, 4], [5, 6, 48, 49]),
            {},
            "train data set: got 48 in row 1 of column 'input_ids'; allowed: 0 to 47, the model's tokens",
        ),
        (ids([], [3, 4], [-1]), {"padding_free": False}, "got -1 in row 2 of column 'input_ids'; allowed: 0 to 47"),
        (ids([3, -100]), {"packing": True, "max_length": 8}, "got -100 in row 0 of column 'input_ids'"),
        (
            masked([-100, 4], [-100, 5], [48, -100]),
            {"packing": True, "max_length": 8},
            "got 48 in row 2 of column 'labels'; allowed: 0 to 47, the model's tokens, or -100",
        ),
        (masked([3, 4], [5, 6], [-1, 7]).select([2, 0]), {}, "got -1 in row 0 of column 'labels'"),
        (ids([3, 48], seq_lengths=[[1, 1]]), {}, "train data set: got 48 in row 0 of column 'input_ids'"),
        (tokens(3), {"eval_dataset": {"a": ids([3, 48])}}, "a data set: got 48 in row 0 of column 'input_ids'"),
        (ids([3, 4], [48]), SKIP, "train_dataset: got 48 in row 1 of column 'input_ids'"),
        (masked([3, 4], [48]), SKIP | {"padding_free": False}, "train_dataset: got 48 in row 1 of column 'labels'"),
        (stream(ids([3, 48])), {}, "train data set: got 48 in row 0 of column 'input_ids'"),
        (stream(masked([-100, -100], [-100, 50])), {}, "train data set: got 50 in row 1 of column 'labels'"),
        (stream(masked([-100, 48])), SKIP, "train_dataset: got 48 in row 0 of column 'labels'"),
        (tokens(3), {"activation_offloading": True}, "activation_offloading: got True on a CPU; allowed: False"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path: Path, data: Any, options: dict[str, Any], message: str) -> None:
    """A sentence that says what to do, when the trainer is built."""
    with pytest.raises(ValueError) as error:
        make(tmp_path, data, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_that_are_not_taken_may_hold_anything(tmp_path: Path, streamed: bool) -> None:
    """Nulls that were filtered out, or in a column that is not read."""
    data = Dataset.from_dict({"text": ["w1 w2", None, "w3 w4"], "note": [None, "a", None]}).select([0, 2])
    assert make(tmp_path, stream(data) if streamed else data).train().global_step == 6
    rows = tokens(3, 4, text=["w1", None])
    assert make(tmp_path, stream(rows) if streamed else rows).train().global_step == 6


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_that_begins_without_a_target(
    tmp_path: Path, packing: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have some later, so that is said, once, and no row is lost; one target in time, and nothing is."""
    monkeypatch.setattr(packed_dataset, "LOOK", 2)
    late, early = masked([5, -100], [6, -100], [7, 8]), masked([5, -100], [7, 8], [6, -100])
    for data, lines in ((late, 1), (early, 0)):
        caplog.clear()
        trainer = make(tmp_path, stream(data), packing=packing, max_length=8)
        said = [
            record for record in caplog.records if "no target in the first 2 documents within max" in record.message
        ]
        assert [record.levelno for record in said] == [logging.WARNING] * lines
        assert sum(len(row["input_ids"]) for row in trainer.train_dataset) == 6
    assert trainer.train().global_step == 6


@pytest.mark.parametrize("blind", [False, True])
def test_batches_without_a_target_are_said(tmp_path: Path, blind: bool, caplog: pytest.LogCaptureFixture) -> None:
    """By the first step, once; what a collator does to the labels is seen nowhere else."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad(examples)
        return batch | {"labels": torch.full_like(batch["labels"], -100)} if blind else batch

    make(tmp_path, tokens(3, 4), data_collator=collate).train()
    assert caplog.text.count("the first step's batches have no target") == blind


def test_several_data_sets_to_train_on(tmp_path: Path) -> None:
    """What `load_dataset` returns without a split."""
    with pytest.raises(TypeError, match=r"^train_dataset: got a DatasetDict of 'train', 'test'; allowed: one data set"):
        make(tmp_path, DatasetDict({"train": tokens(3), "test": tokens(3)}))


def test_a_run_that_would_train_nothing(tmp_path: Path) -> None:
    """A frozen model; peft freezes adapters that are loaded for inference."""
    model = tiny.model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: got no trainable parameter; allowed: at least one"):
        make(tmp_path, tokens(3), model=model)


def test_bfloat16_on_a_card_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bfloat16 counts as none."""
    trainer = make(tmp_path, tokens(3), model=tiny.model(dtype=torch.bfloat16))
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"^bf16: got bfloat16 on 'Tesla T4', which has none; allowed: fp16=True"):
        check_what_is_trained(trainer.model, trainer.args)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (None, {}, (False, True)),
        (None, {"padding_free": False}, (False, False)),
        (None, {"packing": True}, (True, True)),
        (SFTConfig, {}, (False, False)),
        (SFTConfig, {"padding_free": True}, (False, True)),
        (SFTConfig, {"packing": True}, (True, True)),
        (SFTConfig, {"packing": True, "packing_strategy": "wrapped"}, (True, True)),
    ],
)
def test_what_is_decided(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: type | None,
    options: dict[str, Any],
    expected: tuple[bool, bool],
) -> None:
    """And said, once; a maximum length of TRL's default stands in no way of batches without padding."""
    caplog.set_level(logging.INFO, "unsloth_fast")
    options = options | ({"kind": kind} if kind else {})
    args = arguments(tmp_path, **options)
    trainer = UnslothTrainer(tiny.model(), args, train_dataset=tokens(3, 4), processing_class=tiny.tokenizer())
    assert (trainer.args.packing, trainer.args.padding_free) == expected
    assert (args.packing, args.padding_free) == (
        options.get("packing", False),
        options.get("padding_free", args.padding_free),
    )
    words = {True: "on", False: "off"}
    lines = [record.message for record in caplog.records if record.message.startswith("batching:")]
    assert lines == [f"batching: packing {words[expected[0]]}, padding-free {words[expected[1]]}"]
    (batch,) = trainer.get_train_dataloader()
    assert ("attention_mask" in batch) != expected[1]
    assert trainer.train().global_step == 6


PREFIX = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")


def pad(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator of one's own."""
    row = torch.tensor([examples[0]["input_ids"]])
    return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def bloom() -> PreTrainedModel:
    """A model without positions."""
    return BloomForCausalLM(BloomConfig(vocab_size=len(tiny.WORDS), hidden_size=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data_collator": pad}, "a data collator was given"),
        (
            {"peft_config": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
            "prompt learning puts positions",
        ),
        ({"model": bloom}, "BloomForCausalLM is not known to take position_ids"),
    ],
    ids=["collator", "prefix", "bloom"],
)
@pytest.mark.parametrize("packing", [False, True])
def test_what_stands_in_the_way_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], reason: str, packing: bool
) -> None:
    """Neither packing nor padding-free then, a warning where packing was asked for, and training all the same."""
    caplog.set_level(logging.INFO, "unsloth_fast")
    options = {name: value() if name == "model" else value for name, value in options.items()}
    trainer = make(tmp_path, tokens(3, 4), packing=packing, max_length=8, **options)
    assert (trainer.args.packing, trainer.args.padding_free) == (False, False)
    (record,) = [record for record in caplog.records if record.message.startswith("batching:")]
    assert reason in record.message
    assert record.levelno == (logging.WARNING if packing else logging.INFO)
    assert trainer.train().global_step == 6


def test_packing_is_over_the_whole_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not over batches of 1000 rows; what is cut off or trains nothing is said."""
    caplog.set_level(logging.INFO, "unsloth_fast")
    lengths = [9] * 1000 + [7] * 1000 + [20, 1]
    trainer = make(tmp_path, tokens(*lengths), packing=True, max_length=16)
    rows = trainer.train_dataset
    assert len(rows) == 1001  # TRL needs more than 1500
    assert rows.column_names == ["input_ids", "labels", "seq_lengths"]
    assert sorted(map(tuple, rows["seq_lengths"])) == [(9, 7)] * 1000 + [(16,)]
    assert rows[1]["input_ids"] == [*range(3, 12), *range(3, 10)]
    assert "1 of 2002 documents have no target" in caplog.text
    assert "4 tokens are cut off 1 documents of more than max_length=16 tokens; a larger" in caplog.text
    assert "2001 documents of 16020 tokens packed into 1001 rows of 16, 100.0 % full" in caplog.text


@pytest.mark.parametrize(("strategy", "rows"), [("bfd_split", [[8], [8], [5, 3]]), ("wrapped", None)])
def test_the_other_strategies(tmp_path: Path, strategy: str, rows: list[list[int]] | None) -> None:
    """Split documents keep every token; wrapped ones fill every row."""
    trainer = make(tmp_path, tokens(19, 5), packing=True, max_length=8, packing_strategy=strategy)
    assert [len(row) for row in trainer.train_dataset["input_ids"]] == [8, 8, 8]
    if rows:
        assert trainer.train_dataset["seq_lengths"] == rows
    assert trainer.train().global_step == 6


def test_a_stream_is_packed_by_trl(tmp_path: Path) -> None:
    """Its rows come to the model without padding, too."""

    def rows() -> Any:
        yield from ({"text": text} for text in tiny.texts(40))

    trainer = make(tmp_path, IterableDataset.from_generator(rows), packing=True, max_length=24, max_steps=3)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and batch["cu_seq_lens_q"].numel() > 3
    assert trainer.train().global_step == 3


def test_data_are_prepared_by_several_processes(tmp_path: Path) -> None:
    """The rows are those of one process."""
    text = Dataset.from_dict({"text": tiny.texts(6)})
    one, two = (make(tmp_path, text, dataset_num_proc=count).train_dataset for count in (None, 2))
    assert one["input_ids"] == two["input_ids"] and len(one) == 6


def test_batches_are_read_by_each_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever was asked for: cut at the size of a row's first dimension, a packed batch would lose its documents."""
    given = arguments(tmp_path, accelerator_config={"dispatch_batches": True}, max_steps=1)
    trainer = UnslothTrainer(tiny.model(), given, train_dataset=tokens(3, 4), processing_class=tiny.tokenizer())
    (batch,) = trainer.get_train_dataloader()
    assert batch["cu_seq_lens_q"].numel() == 3
    assert given.accelerator_config.dispatch_batches
    assert "dispatch_batches=True has no effect" in caplog.text


def test_a_stream_to_evaluate_is_read_by_each_process(tmp_path: Path) -> None:
    """Its batches are padded to different lengths, which accelerate cannot put together."""
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in tiny.texts(5)))
    for padding_free in (False, True):
        trainer = make(tmp_path, tokens(3), eval_dataset={"a": stream, "b": tokens(3)}, padding_free=padding_free)
        assert trainer.accelerator.dataloader_config.dispatch_batches is False
        assert trainer.evaluate().keys() >= {"eval_a_loss", "eval_b_loss"}
    assert make(tmp_path, tokens(3), padding_free=False).accelerator.dataloader_config.dispatch_batches is None


def test_rows_that_were_packed_before_are_kept(tmp_path: Path) -> None:
    """Whether or not packing is asked for; so an evaluation can be given the data set that the trainer made."""
    for packing in (False, True):
        data = tokens(7, 6, seq_lengths=[[3, 4], [6]])
        trainer = make(tmp_path, data, packing=packing, max_length=8, eval_dataset=tokens(3, 4))
        assert trainer.train_dataset["seq_lengths"] == [[3, 4], [6]]
        first, again = trainer.evaluate(), trainer.evaluate(trainer.eval_dataset)
        assert first["eval_loss"] == again["eval_loss"]


def test_evaluation_of_several_data_sets_padded_or_not(tmp_path: Path) -> None:
    """The same loss for each, however its documents are laid."""
    data = {"a": tokens(3, 9, 5), "b": tokens(4)}
    found = []
    for options in (
        {"padding_free": False},
        {"padding_free": True},
        {"packing": True},
        {"packing": True, "eval_packing": False},
    ):
        with tiny.KeepFloat64():
            model = tiny.model(dtype=torch.float64)
            trainer = make(tmp_path, tokens(3), model=model, eval_dataset=data, max_length=20, **options)
            logged = trainer.evaluate()
        found.append([logged["eval_a_loss"], logged["eval_b_loss"]])
    assert np.ptp(found, axis=0).max() < 1e-12


@pytest.mark.parametrize("padding_free", [False, True])
def test_metrics_and_predictions_come_a_row_a_document(tmp_path: Path, padding_free: bool) -> None:
    """As they do without this package."""
    shapes = []
    trainer = UnslothTrainer(
        tiny.model(),
        arguments(tmp_path, padding_free=padding_free),
        train_dataset=tokens(3, 4),
        eval_dataset=tokens(3, 9, 5),
        processing_class=tiny.tokenizer(),
        compute_metrics=lambda prediction: shapes.append(prediction.label_ids.shape) or {},
    )
    logged = trainer.evaluate()
    assert shapes == [(3, 9)] and "eval_loss" in logged
    assert trainer.predict(tokens(3, 9, 5)).predictions.shape == (3, 9, len(tiny.WORDS))
    (batch,) = trainer.get_train_dataloader()
    assert ("attention_mask" in batch) != padding_free


@pytest.mark.parametrize("options", [{"remove_unused_columns": False}, {"train_sampling_strategy": "group_by_length"}])
def test_options_of_transformers_about_batches(tmp_path: Path, options: dict[str, Any]) -> None:
    """Further columns and another order of the documents do no harm."""
    trainer = make(tmp_path, tokens(3, 9, 5, 4, name=["a", "b", "c", "d"]), **options)
    assert trainer.train().global_step == 6


def test_pad_to_multiple_of(tmp_path: Path) -> None:
    """The row is filled up with one segment that trains nothing and is no token of the data."""
    trainer = make(tmp_path, tokens(3, 4), pad_to_multiple_of=16, max_steps=1)
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape == (1, 16) and sorted(batch["cu_seq_lens_q"].diff().tolist()) == [3, 4, 9]
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("rows", [([3, 4], [48, 5]), ([3, 4], [5, -1])])
def test_what_a_stream_brings_later_is_looked_at_in_the_batch(tmp_path: Path, rows: tuple[list[int]]) -> None:
    """On the CPU, too."""
    with pytest.raises(ValueError, match=r"^input_ids: got (48|-1) .* allowed: 0 to 47"):
        make(tmp_path, stream(ids(*rows))).train()


def test_a_tokenizer_of_more_tokens_than_the_model_is_named(tmp_path: Path) -> None:
    """What is tokenized here is looked at as well; a collator of one's own may make something else of it."""
    model = {"model": tiny.model(vocab_size=40)}
    with pytest.raises(ValueError, match=r"^train data set: got 42 in row 1 of column 'input_ids'; allowed: 0 to 39"):
        make(tmp_path, text("w1 w2", "w3 w39"), **model)
    make(tmp_path, text("w1 w2", "w3 w39"), data_collator=lambda examples: {}, **model)


def test_targets_are_those_that_something_foretells() -> None:
    """Cut at a length or not; documents without any are left out where that is asked for."""
    rows = [[5, -100, 7], [6, -100], [], [8], [-100, 9]]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    with_targets = packed_dataset.with_targets
    assert with_targets(data, "train", drop=True)["labels"] == [[5, -100, 7], [-100, 9]]
    assert with_targets(data, "train", max_length=2, drop=True)["labels"] == [[-100, 9]]
    assert with_targets(data, "train", max_length=2, keep_end=True, drop=True)["labels"] == [[5, -100, 7], [-100, 9]]
    assert with_targets(data, "train") is data
    with pytest.raises(ValueError, match=r"^train: got no target in 1 documents within max_length=2 tokens"):
        with_targets(masked([3, 4, -100, -100]), "train", max_length=2, keep_end=True)
    packed_dataset.check_stream(masked([3, -100, 4]), "train", max_length=2, keep_end=True)
    with pytest.raises(ValueError, match=r"^train: got no target in 1 documents within max_length=2 tokens"):
        packed_dataset.check_stream(masked([3, 4, -100, -100]), "train", max_length=2, keep_end=True)


@pytest.mark.parametrize("options", [{"padding_free": False}, {"padding_free": True}, {"packing": True}])
@pytest.mark.parametrize("longest", [8, 12])
def test_what_is_cut_off_is_said(
    tmp_path: Path, options: dict[str, Any], longest: int, caplog: pytest.LogCaptureFixture
) -> None:
    """How much, at which length and what to do, padded, padding-free and packed alike."""
    trainer = make(tmp_path, tokens(3, longest, longest), max_length=8, **options)
    assert sum(len(row) for row in trainer.train_dataset["input_ids"]) == 19
    line = (
        "train data set: 8 tokens are cut off 2 documents of more than max_length=8 tokens; a larger max_length keeps "
        "them whole, packing=True with packing_strategy='bfd_split' in pieces"
    )
    assert [record.message for record in caplog.records if "cut off" in record.message] == [line] * (longest > 8)


def test_lora_by_name_of_the_model(tmp_path: Path) -> None:
    """A path instead of a model: its configuration decides about the batches before it is loaded."""
    folder = tiny.folder(tmp_path / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = arguments(tmp_path, model_init_kwargs={"dtype": "float32"})
    trainer = UnslothTrainer(folder, args, train_dataset=tokens(3, 4), peft_config=lora)
    assert trainer.args.padding_free and trainer.train().global_step == 6


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_stream_that_ends_within_a_step_trains_as_other_data_do(tmp_path: Path, padding_free: bool) -> None:
    """Three documents, two a step: the pass ends with a step of one, as with data whose length is known."""

    class InOrder(UnslothTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    data, logs = tokens(5, 9, 3), []
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5}
    for rows in (data, stream(data)):
        model = tiny.model(dtype=torch.float64)
        trainer = make(tmp_path, rows, kind=InOrder, model=model, padding_free=padding_free, **options)
        trainer.train()
        logs.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log])
    assert len(logs[0]) == 5
    assert logs[0] == logs[1]

"""From a data set to batches: what is decided, and what is said."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig
from torch.utils.data import SequentialSampler
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel
from trl import SFTConfig

from tests import tiny
from tests.trainer.runs import LOSES_LABELS, arguments
from unsloth_fast import UnslothTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


def tokens(*lengths: int, **columns: Any) -> Dataset:
    """Documents of these lengths, every token a target."""
    rows = [list(range(3, 3 + length)) for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows} | columns)


def stream(data: Dataset) -> IterableDataset:
    """The same rows, of which only the first can be asked for, as from a hub."""
    return IterableDataset.from_generator(lambda: iter(data.to_list()))


def make(folder: Path, data: Any, kind: type = UnslothTrainer, **options: Any) -> Any:
    """A trainer on these data."""
    more = {
        name: options.pop(name) for name in ("model", "eval_dataset", "data_collator", "peft_config") if name in options
    }
    more = {"model": tiny.model()} | more
    return kind(args=arguments(folder, **options), train_dataset=data, processing_class=tiny.tokenizer(), **more)


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
        ({"data_collator": pad}, "a data collator was passed"),
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


def test_the_labels_of_a_stream_are_packed_or_it_is_refused(tmp_path: Path) -> None:
    """TRL before 1.7 packs the tokens alone."""
    data = stream(Dataset.from_dict({"input_ids": [[3, 4, 5, 6]] * 6, "labels": [[-100, -100, 5, 6]] * 6}))
    if LOSES_LABELS:
        with pytest.raises(ValueError, match="train data set: got a stream with labels to pack, which the installed"):
            make(tmp_path, data, packing=True, max_length=8, max_steps=1)
    else:
        trainer = make(tmp_path, data, packing=True, max_length=8, max_steps=1)
        assert next(iter(trainer.get_train_dataloader()))["labels"][0, :8].tolist() == 2 * [-100, -100, 5, 6]


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

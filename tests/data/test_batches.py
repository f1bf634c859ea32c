"""From a data set to the batches of a trainer: the decisions, the log, and the rows that result."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from torch.utils.data import SequentialSampler
from trl import SFTConfig

from tests import tiny
from tests.data.samples import SKIP, bloom, first_alone, stream, text, tokens, trainer_on
from tests.trainer.runs import TRL_DROPS_LABELS, arguments
from unsloth_fast import UnslothTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


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
def test_packing_and_padding_free_follow_the_arguments(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: type | None,
    options: dict[str, Any],
    expected: tuple[bool, bool],
) -> None:
    """The decision is logged once. TRL's default max_length does not prevent batches without padding."""
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data_collator": first_alone}, "a data collator was "),
        ({"peft_config": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}, "prompt learning puts "),
        ({"model": bloom}, "the model takes no position_ids"),
    ],
    ids=["collator", "prefix", "bloom"],
)
@pytest.mark.parametrize("packing", [False, True])
def test_an_obstacle_turns_packing_off_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], reason: str, packing: bool
) -> None:
    """A warning is logged if packing was requested. Packing and padding-free are off, and the model trains."""
    caplog.set_level(logging.INFO, "unsloth_fast")
    options = {name: value() if name == "model" else value for name, value in options.items()}
    trainer = trainer_on(tmp_path, tokens(3, 4), packing=packing, max_length=8, **options)
    assert (trainer.args.packing, trainer.args.padding_free) == (False, False)
    (record,) = [record for record in caplog.records if record.message.startswith("batching:")]
    assert reason in record.message
    assert record.levelno == (logging.WARNING if packing else logging.INFO)
    assert trainer.train().global_step == 6


def test_the_whole_data_set_is_packed_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Packing is not done in batches of 1000 rows. The log reports truncated tokens and documents without a target."""
    caplog.set_level(logging.INFO, "unsloth_fast")
    lengths = [9] * 1000 + [7] * 1000 + [20, 1]
    trainer = trainer_on(tmp_path, tokens(*lengths), packing=True, max_length=16)
    rows = trainer.train_dataset
    assert len(rows) == 1001  # TRL needs more than 1500
    assert rows.column_names == ["input_ids", "labels", "seq_lengths"]
    assert sorted(map(tuple, rows["seq_lengths"])) == [(9, 7)] * 1000 + [(16,)]
    assert rows[1]["input_ids"] == [*range(3, 12), *range(3, 10)]
    assert "documents without a target do not change the loss: 1 of 2002" in caplog.text
    assert "max_length=16 cuts 4 tokens off 1 document; a larger" in caplog.text
    assert "2001 documents of 16020 tokens packed into 1001 rows of 16, 100.0 % full" in caplog.text


@pytest.mark.parametrize(("strategy", "rows"), [("bfd_split", [[8], [8], [5, 3]]), ("wrapped", None)])
def test_packing_strategies_that_keep_every_token(tmp_path: Path, strategy: str, rows: list[list[int]] | None) -> None:
    """ "bfd_split" keeps every token of a long document, "wrapped" fills every row."""
    trainer = trainer_on(tmp_path, tokens(19, 5), packing=True, max_length=8, packing_strategy=strategy)
    assert [len(row) for row in trainer.train_dataset["input_ids"]] == [8, 8, 8]
    if rows:
        assert trainer.train_dataset["seq_lengths"] == rows
    assert trainer.train().global_step == 6


def test_a_stream_is_packed_by_trl(tmp_path: Path) -> None:
    """Its batches are padding-free, too."""
    trainer = trainer_on(tmp_path, stream(text(*tiny.texts(40))), packing=True, max_length=24, max_steps=3)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and batch["cu_seq_lens_q"].numel() > 3
    assert trainer.train().global_step == 3


def test_a_stream_with_labels_is_packed_with_them_or_refused(tmp_path: Path) -> None:
    """TRL before 1.7 packs the tokens alone."""
    data = stream(Dataset.from_dict({"input_ids": [[3, 4, 5, 6]] * 6, "labels": [[-100, -100, 5, 6]] * 6}))
    if TRL_DROPS_LABELS:
        with pytest.raises(ValueError, match="train data set: got a stream with labels to pack, which the installed"):
            trainer_on(tmp_path, data, packing=True, max_length=8, max_steps=1)
    else:
        trainer = trainer_on(tmp_path, data, packing=True, max_length=8, max_steps=1)
        assert next(iter(trainer.get_train_dataloader()))["labels"][0, :8].tolist() == 2 * [-100, -100, 5, 6]


def test_several_processes_prepare_the_same_rows_as_one(tmp_path: Path) -> None:
    data = text(*tiny.texts(6))
    one, two = (trainer_on(tmp_path, data, dataset_num_proc=count).train_dataset for count in (None, 2))
    assert one["input_ids"] == two["input_ids"] and len(one) == 6


def test_each_process_reads_its_own_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """This holds with dispatch_batches=True too: accelerate would split the tensors of a packed batch."""
    given = arguments(tmp_path, accelerator_config={"dispatch_batches": True}, max_steps=1)
    trainer = UnslothTrainer(tiny.model(), given, train_dataset=tokens(3, 4), processing_class=tiny.tokenizer())
    (batch,) = trainer.get_train_dataloader()
    assert batch["cu_seq_lens_q"].numel() == 3
    assert given.accelerator_config.dispatch_batches
    assert "dispatch_batches=True has no effect" in caplog.text


def test_each_process_reads_a_stream_to_evaluate(tmp_path: Path) -> None:
    """Its batches are padded to different lengths, which accelerate cannot concatenate."""
    rows = stream(text(*tiny.texts(5)))
    for padding_free in (False, True):
        trainer = trainer_on(tmp_path, tokens(3), eval_dataset={"a": rows, "b": tokens(3)}, padding_free=padding_free)
        assert trainer.accelerator.dataloader_config.dispatch_batches is False
        assert trainer.evaluate().keys() >= {"eval_a_loss", "eval_b_loss"}
    assert trainer_on(tmp_path, tokens(3), padding_free=False).accelerator.dataloader_config.dispatch_batches is None


def test_rows_that_are_already_packed_are_kept(tmp_path: Path) -> None:
    """They are kept with packing on or off, so `evaluate` accepts a data set that the trainer has packed."""
    for packing in (False, True):
        data = tokens(7, 6, seq_lengths=[[3, 4], [6]])
        trainer = trainer_on(tmp_path, data, packing=packing, max_length=8, eval_dataset=tokens(3, 4))
        assert trainer.train_dataset["seq_lengths"] == [[3, 4], [6]]
        first, again = trainer.evaluate(), trainer.evaluate(trainer.eval_dataset)
        assert first["eval_loss"] == again["eval_loss"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("options", [{}, SKIP], ids=["prepared", "skipped"])
def test_rows_that_are_already_packed_are_not_padded(tmp_path: Path, options: dict[str, Any], streamed: bool) -> None:
    """A plain `trl.SFTConfig` does not ask for padding; our arguments do, and a model may require it."""
    data = tokens(7, 6, seq_lengths=[[3, 4], [6]])
    rows = stream(data) if streamed else data
    refused = (
        "got packed rows .the column 'seq_lengths'., and padded batches, because {}; allowed: padding-free batches"
    )
    args = arguments(tmp_path, SFTConfig, **options)
    given = {"model": tiny.model(), "processing_class": tiny.tokenizer()}
    batch = next(iter(UnslothTrainer(args=args, train_dataset=rows, **given).get_train_dataloader()))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] or streamed
    assert (batch["position_ids"] == 0).sum() >= 2 and batch["labels"][batch["position_ids"] == 0].unique() == -100
    with pytest.raises(ValueError, match=refused.format("padding_free=False was requested")):
        trainer_on(tmp_path, rows, padding_free=False, **options)
    with pytest.raises(ValueError, match=refused.format(".*; the model takes no position_ids.*")):
        trainer_on(tmp_path, tokens(3), eval_dataset={"a": tokens(4), "b": rows}, model=bloom(), **options)
    trainer = trainer_on(tmp_path, tokens(3), padding_free=False, **options)
    with pytest.raises(ValueError, match=f"eval_dataset: {refused.format('the trainer was built with them')}"):
        trainer.evaluate(rows)
    single = tokens(3, 4, seq_lengths=[[3], [4]])
    assert trainer_on(tmp_path, single, padding_free=False, **options).train().global_step == 6


def test_padding_and_packing_do_not_change_the_evaluation_loss(tmp_path: Path) -> None:
    """The loss of each of several data sets is the same."""
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
            trainer = trainer_on(tmp_path, tokens(3), model=model, eval_dataset=data, max_length=20, **options)
            logged = trainer.evaluate()
        found.append([logged["eval_a_loss"], logged["eval_b_loss"]])
    assert np.ptp(found, axis=0).max() < 1e-12


@pytest.mark.parametrize("padding_free", [False, True])
def test_metrics_and_predictions_have_one_row_per_document(tmp_path: Path, padding_free: bool) -> None:
    """This is as in transformers."""
    shapes = []
    trainer = trainer_on(
        tmp_path,
        tokens(3, 4),
        eval_dataset=tokens(3, 9, 5),
        compute_metrics=lambda prediction: shapes.append(prediction.label_ids.shape) or {},
        padding_free=padding_free,
    )
    logged = trainer.evaluate()
    assert shapes == [(3, 9)] and "eval_loss" in logged
    assert trainer.predict(tokens(3, 9, 5)).predictions.shape == (3, 9, len(tiny.WORDS))
    (batch,) = trainer.get_train_dataloader()
    assert ("attention_mask" in batch) != padding_free


@pytest.mark.parametrize("options", [{"remove_unused_columns": False}, {"train_sampling_strategy": "group_by_length"}])
def test_transformers_options_for_batches_work(tmp_path: Path, options: dict[str, Any]) -> None:
    """Unused columns stay in the data set, and documents are ordered by length."""
    trainer = trainer_on(tmp_path, tokens(3, 9, 5, 4, name=["a", "b", "c", "d"]), **options)
    assert trainer.train().global_step == 6


def test_a_row_is_padded_to_a_multiple(tmp_path: Path) -> None:
    """The row is padded with one further segment, whose tokens are not targets."""
    trainer = trainer_on(tmp_path, tokens(3, 4), pad_to_multiple_of=16, max_steps=1)
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape == (1, 16) and sorted(batch["cu_seq_lens_q"].diff().tolist()) == [3, 4, 9]
    assert trainer.train().global_step == 1


def test_a_model_may_be_a_path(tmp_path: Path) -> None:
    """The model's configuration decides about the batches before the weights are loaded; here with LoRA."""
    folder = tiny.folder(tmp_path / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = arguments(tmp_path, model_init_kwargs={"dtype": "float32"})
    trainer = UnslothTrainer(folder, args, train_dataset=tokens(3, 4), peft_config=lora)
    assert trainer.args.padding_free and trainer.train().global_step == 6


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_stream_that_ends_within_a_step_trains_like_a_data_set(tmp_path: Path, padding_free: bool) -> None:
    """Three documents, two per step: the pass ends with a step of one, as with data of known length."""

    class InOrder(UnslothTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    data, logs = tokens(5, 9, 3), []
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5}
    for rows in (data, stream(data)):
        model = tiny.model(dtype=torch.float64)
        trainer = trainer_on(tmp_path, rows, trainer_class=InOrder, model=model, padding_free=padding_free, **options)
        trainer.train()
        logs.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log])
    assert len(logs[0]) == 5
    assert logs[0] == logs[1]

"""Evaluation: the mean over all targets of a data set, for any batches; `test_processes.py` has several processes."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import unsloth_ref.training
from tests import tiny
from tests.data.samples import tokens
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer
from unsloth_fast.data.collator import PackedCollator
from unsloth_fast.hooks.evaluation import (
    Evaluated,
    Scores,
    collator_for,
    labels_counted_once,
    prediction_of,
    wants_scores,
)

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHINGS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 24},
    "only training packed": {"packing": True, "max_length": 24, "eval_packing": False},
}


def texts(count: int = 7, seed: int = 1) -> Dataset:
    """Texts of 1 to 20 words, so that the mean of the batches' means differs from the mean by several percent."""
    return Dataset.from_dict({"text": tiny.texts(count, seed)})


def by_hand(data: Dataset, dtype: torch.dtype = torch.float64) -> float:
    """The mean over all targets for the model that `build` makes: torch's cross entropy, one document at a time."""
    model, total, targets = tiny.model(dtype=dtype), 0.0, 0
    for text in data["text"]:
        tokens = torch.tensor([tiny.tokenizer()(text + "<eos>")["input_ids"]])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, :-1]
        total += cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        targets += tokens.shape[1] - 1
    return total / targets


def test_packed_evaluation_needs_batches_without_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is off where batches are padded, which is logged, and `evaluate` works."""
    options = {"padding_free": False, "eval_packing": True, "max_length": 24}
    trainer = build(UnslothTrainer, arguments(tmp_path, **options), eval_dataset=texts())
    assert "eval_packing: off, as batches are padded" in caplog.messages
    assert trainer.evaluate()["eval_loss"] == pytest.approx(by_hand(texts()), rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_the_loss_is_the_mean_over_all_targets(tmp_path: Path, batching: str, size: int) -> None:
    """In float64 it is, with and without metrics, for several data sets, in `evaluate` and in `predict`."""
    data = {"a": texts(), "b": texts(2, seed=2)}
    options = BATCHINGS[batching] | {"per_device_eval_batch_size": size}
    with tiny.KeepFloat64():
        expected = {name: pytest.approx(by_hand(part), rel=1e-12) for name, part in data.items()}
        for metrics in (None, lambda prediction: {"rows": len(prediction.label_ids)}):
            trainer = build(UnslothTrainer, arguments(tmp_path, **options), eval_dataset=data, compute_metrics=metrics)
            logged = trainer.evaluate()
            assert {name: logged[f"eval_{name}_loss"] for name in data} == expected
            assert trainer.evaluate(trainer.eval_dataset["b"], metric_key_prefix="b")["b_loss"] == expected["b"]
            assert trainer.predict(trainer.eval_dataset["a"]).metrics["test_loss"] == expected["a"]
        trainer.args.prediction_loss_only = True
        assert trainer.predict(trainer.eval_dataset["a"]).metrics["test_loss"] == expected["a"]


def test_a_prediction_step_works_alone(tmp_path: Path) -> None:
    """A user's script may call it before any evaluation."""
    trainer = build(UnslothTrainer, arguments(tmp_path, per_device_eval_batch_size=7), eval_dataset=texts())
    (batch,) = trainer.get_eval_dataloader()
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    assert loss.item() == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert logits is None and labels is None


# The losses of the batches, their targets, whether batches that are not finite are left out, and the mean.
MEANS = [
    ([2.0, math.nan, 5.0], [3, 5, 1], True, 2.75),
    ([2.0, math.nan, 5.0], [3, 5, 1], False, math.nan),
    ([math.nan, 0.0], [5, 0], True, math.nan),
    ([0.0, 0.0], [0, 0], True, 0.0),
    ([3.0, 0.0], [2, 0], False, 3.0),
]


@pytest.mark.parametrize(
    ("losses", "targets", "finite_only", "expected"), [*MEANS, ([2.0, math.inf], [3, 1], True, 2.0)]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_mean_weighs_each_batch_by_its_targets(
    losses: list[float], targets: list[int], finite_only: bool, expected: float, processes: int
) -> None:
    """The mean is over all processes; here each has the batches of this one."""
    evaluated = Evaluated(finite_only=finite_only)
    for loss, count in zip(losses, targets, strict=True):
        evaluated.add(torch.tensor(loss), torch.tensor(count))
    mean = evaluated.mean(lambda totals: totals * processes)
    assert mean == pytest.approx(expected, nan_ok=True)


def test_the_mean_includes_the_batches_of_other_processes() -> None:
    """The function that sums over devices receives the sum of losses, the targets, and the sum with all batches."""
    evaluated = Evaluated()
    evaluated.add(torch.tensor(2.0), torch.tensor(3))
    assert evaluated.mean(lambda totals: totals + torch.tensor([4.0, 1, 4])) == 2.5


def test_an_evaluation_without_batches_has_no_loss() -> None:
    assert Evaluated().mean(lambda totals: totals) is None


def test_the_mean_is_computed_in_float64() -> None:
    """In float32 the sum would lose the second loss."""
    evaluated = Evaluated()
    for loss in (2.0**24, 1.0):
        evaluated.add(torch.tensor(loss), torch.tensor(1))
    assert evaluated.mean(lambda totals: totals) == (2**24 + 1) / 2


def test_batches_without_scores_are_not_counted() -> None:
    scores = Scores()
    scores.add(None)
    assert scores.take(lambda totals: totals) == {}
    scores.add(torch.tensor([3.0, 2.0, 4.0]))
    scores.add(None)
    assert scores.take(lambda totals: totals) == {"mean_token_accuracy": 0.75, "entropy": 0.5}


def test_the_loss_replaces_that_of_the_loop() -> None:
    """A loop without metrics gets none."""
    for metrics in ({"eval_loss": 9.0, "eval_runtime": 1.0}, None):
        evaluated = Evaluated()
        evaluated.add(torch.tensor(2.0), torch.tensor(3))
        evaluated.write_to(metrics, "eval", lambda totals: totals)
        assert metrics in ({"eval_loss": 2.0, "eval_runtime": 1.0}, None)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_outputs", [False, True])
@pytest.mark.parametrize(
    ("metric", "is_score"), [(None, False), ("loss", False), ("entropy", True), ("eval_b_mean_token_accuracy", True)]
)
def test_a_batch_is_scored_for_its_logits_or_for_the_best_model(
    metric: str | None, is_score: bool, with_outputs: bool, training: bool
) -> None:
    trainer = SimpleNamespace(
        args=SimpleNamespace(metric_for_best_model=metric), model=SimpleNamespace(training=training)
    )
    assert wants_scores(trainer, with_outputs) is (with_outputs or (is_score and not training))


def test_a_prediction_is_a_loss_alone_or_has_logits_and_labels() -> None:
    loss, logits, labels = torch.tensor(2.0), torch.zeros(1, 2, 3), torch.tensor([[1, 2]])
    assert prediction_of(loss, labels, loss_only=True) == (loss, None, None)
    found = prediction_of((loss, SimpleNamespace(logits=logits)), labels, loss_only=False)
    assert found[0] is loss and found[1] is logits and found[2] is labels


PACKED = PackedCollator(pad_token_id=0, padding_free=True, collate=unsloth_ref.training.collate, vocab_size=48)
PADDING = DataCollatorForLanguageModeling(pad_token_id=0)


@pytest.mark.parametrize("row_per_document", [False, True])
def test_a_users_collator_is_kept_in_an_evaluation(row_per_document: bool) -> None:
    usual = DataCollatorForLanguageModeling(pad_token_id=0)
    assert collator_for(tokens(3), usual, PADDING, row_per_document=row_per_document) is usual


def test_an_evaluation_with_one_row_per_document_is_padded() -> None:
    """Packed rows are not padded: their documents are in one row already."""
    assert collator_for(tokens(3), PACKED, PADDING, row_per_document=True) is PADDING
    rows = tokens(3, seq_lengths=[[1, 2]])
    assert collator_for(rows, PACKED, PADDING, row_per_document=True) == replace(PACKED, with_ends=True)


def test_an_evaluation_in_one_row_holds_the_ends_of_its_examples() -> None:
    """The collator of training is not changed."""
    collator = collator_for(tokens(3), PACKED, PADDING, row_per_document=False)
    assert collator == replace(PACKED, with_ends=True) and not PACKED.with_ends


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("last", "remainder", "rank", "kept"),
    [
        (False, 3, 0, 2),  # not the last batch
        (True, -1, 0, 2),  # of a length that accelerate does not know
        (True, 0, 0, 2),  # full
        (True, 3, 0, 2),
        (True, 3, 1, 1),
        (True, 2, 1, 0),
        (True, 1, 0, 1),
        (True, 1, 1, 0),
    ],
)
def test_repeated_documents_of_the_last_batch_are_not_counted(
    last: bool, remainder: int, rank: int, kept: int, tp_size: int
) -> None:
    """Each process has two documents, in own rows or in one. The last batch has `remainder` new documents.

    Tensor-parallel processes share a batch, and with it a rank.
    """
    state = SimpleNamespace(end_of_dataloader=last, remainder=remainder)
    accelerator = SimpleNamespace(gradient_state=state, process_index=rank * tp_size + tp_size - 1)
    rows = torch.arange(6).reshape(2, 3)
    found = labels_counted_once(rows, None, accelerator, tp_size)
    assert torch.equal(found[:kept], rows[:kept]) and (found[kept:] == -100).all()
    row, ends = torch.arange(6)[None], torch.tensor([4, 6])
    found = labels_counted_once(row, ends, accelerator, tp_size)
    end = [0, 4, 6][kept]
    assert torch.equal(found[:, :end], row[:, :end]) and (found[:, end:] == -100).all()


@pytest.mark.parametrize(("losses", "targets", "filters", "expected"), MEANS)
def test_batches_whose_loss_is_not_finite_are_left_out(
    tmp_path: Path, losses: list[float], targets: list[int], filters: bool, expected: float
) -> None:
    """`logging_nan_inf_filter` leaves them out, as in transformers, unless there are no others."""
    trainer = build(UnslothTrainer, arguments(tmp_path, logging_nan_inf_filter=filters), eval_dataset=texts())
    waiting = iter(zip(losses, targets, strict=True))

    def prediction_step(*positional: Any, **keywords: Any) -> Any:
        loss, count = next(waiting)
        trainer._evaluated.add(torch.tensor(loss), torch.tensor(count))
        return torch.tensor(loss), None, None

    trainer.prediction_step = prediction_step
    trainer.args.per_device_eval_batch_size = -(-7 // len(losses))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, nan_ok=True)


def test_the_best_checkpoint_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """Its metric is the loss of the data set that metric_for_best_model names."""
    chosen = []
    for size in (1, 2):
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 4}
        options |= {"metric_for_best_model": "eval_a_loss", "per_device_eval_batch_size": size}
        with tiny.KeepFloat64():
            data = {"a": texts(), "b": texts(2, seed=2)}
            trainer = build(UnslothTrainer, arguments(tmp_path / str(size), **options), eval_dataset=data)
            trainer.train()
        chosen.append((trainer.state.best_metric, trainer.state.best_global_step))
    assert chosen[0] == (pytest.approx(chosen[1][0], rel=1e-12), chosen[1][1])

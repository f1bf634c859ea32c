"""Evaluation: the mean over all targets of a data set, however its documents come in batches and on processes."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from tests import tiny
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHINGS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "max_length": 24},
    "packed training alone": {"packing": True, "max_length": 24, "eval_packing": False},
}


def texts(count: int = 7, seed: int = 1) -> Dataset:
    """Texts of 1 to 20 words, so that a mean of the means of batches differs from the mean by percents."""
    return Dataset.from_dict({"text": tiny.texts(count, seed)})


def by_hand(data: Dataset, dtype: torch.dtype = torch.float64) -> float:
    """The mean over all targets of the model that `build` makes, a document after the other, by torch."""
    model, total, targets = tiny.model(dtype=dtype), 0.0, 0
    for text in data["text"]:
        tokens = torch.tensor([tiny.tokenizer()(text + "<eos>")["input_ids"]])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, :-1]
        total += cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        targets += tokens.shape[1] - 1
    return total / targets


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_the_loss_is_the_mean_over_all_targets(tmp_path: Path, batching: str, size: int) -> None:
    """With the loss alone, with metrics, of several data sets, and of a prediction; float64 throughout."""
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


def test_a_step_may_be_taken_by_itself(tmp_path: Path) -> None:
    """Before any evaluation, as a script of one's own does."""
    trainer = build(UnslothTrainer, arguments(tmp_path, per_device_eval_batch_size=7), eval_dataset=texts())
    (batch,) = trainer.get_eval_dataloader()
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    assert loss.item() == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert logits is None and labels is None


RANK = """
import sys, torch
from tests import tiny
from tests.trainer.runs import arguments, build
from tests.trainer.test_evaluation import BATCHINGS, texts
from unsloth_fast import UnslothTrainer
found = {}
with tiny.KeepFloat64():
    for batching, options in BATCHINGS.items():
        for size in (1, 2, 3):
            for metrics in (None, lambda prediction: {"rows": len(prediction.label_ids)}):
                args = arguments(sys.argv[1], per_device_eval_batch_size=size, **options)
                trainer = build(UnslothTrainer, args, eval_dataset=texts(), compute_metrics=metrics)
                found[batching, size, metrics is None] = trainer.evaluate(), trainer.state.log_history[-1]
torch.save(found, f"{sys.argv[1]}/{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path: Path) -> None:
    """Documents that fill up the last batches, up to two of three of them, count once; in the accuracy, too."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with tiny.KeepFloat64():
        expected = pytest.approx(by_hand(texts()), rel=1e-12)
    alone = build(UnslothTrainer, arguments(tmp_path), eval_dataset=texts(), compute_metrics=lambda prediction: {})
    alone.evaluate()
    accuracy = alone.state.log_history[-1]["eval_mean_token_accuracy"]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert len(found) == 24
        for (batching, _, without_metrics), (logged, history) in found.items():
            assert logged["eval_loss"] == expected, batching
            if not without_metrics:
                assert history["eval_mean_token_accuracy"] == accuracy, batching
                assert logged["eval_rows"] == 7 or BATCHINGS[batching].get("eval_packing", True), batching


@pytest.mark.parametrize(
    ("losses", "targets", "filters", "expected"),
    [
        ([2.0, math.nan, 5.0], [3, 5, 1], True, 2.75),
        ([2.0, math.nan, 5.0], [3, 5, 1], False, math.nan),
        ([math.nan, 0.0], [5, 0], True, math.nan),
        ([0.0, 0.0], [0, 0], True, 0.0),
        ([3.0, 0.0], [2, 0], False, 3.0),
    ],
)
def test_losses_that_are_not_finite(
    tmp_path: Path, losses: list[float], targets: list[int], filters: bool, expected: float
) -> None:
    """`logging_nan_inf_filter` leaves out their batches, as in transformers, unless there is no other."""
    trainer = build(UnslothTrainer, arguments(tmp_path, logging_nan_inf_filter=filters), eval_dataset=texts())
    waiting = iter(zip(losses, targets, strict=True))

    def prediction_step(*positional: Any, **keywords: Any) -> Any:
        loss, count = next(waiting)
        trainer._evaluated.add(torch.tensor(loss), torch.tensor(count))
        return torch.tensor(loss), None, None

    trainer.prediction_step = prediction_step
    trainer.args.per_device_eval_batch_size = -(-7 // len(losses))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, nan_ok=True)


def test_the_best_checkpoint_is_chosen_by_that_loss(tmp_path: Path) -> None:
    """Of the data set that was named, of batches of one and of two texts."""
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

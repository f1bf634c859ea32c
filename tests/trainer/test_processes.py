"""Two processes, started by torchrun or accelerate, on gloo: compared with one, and with plain TRL on its own model."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.processes import PATIENCE
from tests.trainer import rank
from tests.trainer.rank import Run
from tests.trainer.runs import arguments, build, plain_trl
from tests.trainer.test_evaluation import BATCHINGS, by_hand, texts
from unsloth_fast import UnslothTrainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module"]  # its --cpu starts only one process

# SGD, as AdamW would hide a gradient that is too large or too small by a constant factor.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}

RUNS = {
    "torchrun": [
        Run("packed", "full", 1, SGD),
        Run("packed", "embedding rate", 4),
        Run("padding-free", "full", 4, SGD),
        Run("padding-free", "lora", 1),
        Run("padded", "embedding rate", 1, resumed=True),
        Run("padded", "lora", 4),
    ],
    "torchrun, sharded": [
        Run("packed", "embedding rate", 4, sharded=True, resumed=True),
        Run("padding-free", "full", 1, SGD, sharded=True),
    ],
    "accelerate": [Run("packed", "embedding rate", 4), Run("packed", "embedding rate", 4, sharded=True)],
}
EXACT = Run("packed", "embedding rate", 2, {"max_steps": 2, "backend": "reference"})
PLAIN = replace(EXACT, dtype="float32")
FAST = replace(PLAIN, options={"max_steps": 2, "backend": "fast"})
BFLOAT16 = Run("packed", "embedding rate", 2, {"max_steps": 4, "bf16": True}, sharded=True, dtype="float32")

Found = list[tuple[dict[str, Any], dict[str, Any]]]  # per run, the results of both processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """The results by name; torchrun starts once for all that it runs, as starting takes longer than a run."""
    of_torchrun: dict[str, Sequence[Run | None]] = {name: runs for name, runs in RUNS.items() if name != "accelerate"}
    of_torchrun |= {"float64": [EXACT, PLAIN, FAST], "bfloat16": [BFLOAT16], "evaluations": [None]}
    every = launch(
        tmp_path_factory.mktemp("torchrun"), TORCHRUN, [run for runs in of_torchrun.values() for run in runs]
    )
    results = iter(every)
    found = {name: [next(results) for _ in runs] for name, runs in of_torchrun.items()}
    return found | {"accelerate": launch(tmp_path_factory.mktemp("accelerate"), ACCELERATE, RUNS["accelerate"])}


def launch(folder: Path, launcher: list[str], runs: Sequence[Run | None]) -> Found:
    """The results of both processes for each run."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "tests.trainer.rank", str(folder), rank.as_json(runs)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(zip(*(torch.load(folder / f"{index}.pt", weights_only=False) for index in (0, 1)), strict=True))


def mean(two: tuple[dict[str, Any], dict[str, Any]]) -> list[float]:
    """The loss over both processes: each divides the sum over its targets by the targets of both, times two."""
    return [(first + second) / 2 for first, second in zip(two[0]["losses"], two[1]["losses"], strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], tuple[dict[str, Any], list[float]]]:
    """The results of a run in one process, and the losses of plain TRL, once for all runs with the same arguments."""
    known: dict[str, tuple[dict[str, Any], list[float]]] = {}

    def results(run: Run) -> tuple[dict[str, Any], list[float]]:
        run = replace(run, sharded=False, resumed=False)
        if (key := repr(run)) not in known:
            folder = tmp_path_factory.mktemp("alone")
            theirs = plain_trl(folder / "theirs", run.batching, run.trained, **run.given)
            known[key] = rank.train(folder / "ours", run, 2), theirs.losses
        return known[key]

    return results


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one_and_like_plain_trl(
    name: str, found: dict[str, Found], alone: Callable[[Run], tuple[dict[str, Any], list[float]]]
) -> None:
    """In float64 only rounding differs, amplified by AdamW to at most 1e-12; a wrong count changes losses by 1e-2."""
    for run, two in zip(RUNS[name], found[name], strict=True):
        one, theirs = alone(run)
        assert len(one["losses"]) >= 20
        assert mean(two) == pytest.approx(one["losses"], rel=1e-9), run
        assert mean(two) == pytest.approx(theirs, rel=1e-9), run
        assert len(set(one["items"])) > 1
        roles = {"base", "embedding"} if run.trained == "embedding rate" else {None}
        for other in two:
            assert other["items"] == one["items"]
            assert other["groups"] == one["groups"] and {group[0] for group in one["groups"]} == roles
            assert (other["shards"] > 0) == run.sharded
            assert not other["logits"] and not one["logits"]
            assert other["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-9)
            assert other["eval_rows"] == one["eval_rows"] == [5]
            assert other.get("again") == (other["losses"][len(other["losses"]) // 2 :] if run.resumed else None)
            for mine, their in zip(one["log"], other["log"], strict=True):
                # Logged values are rounded to float32.
                for key in mine.keys() & {"loss", "num_tokens", "learning_rate", "embedding_learning_rate", "epoch"}:
                    assert their[key] == pytest.approx(mine[key], rel=2.0**-22), (run, key)


def test_fast_on_two_processes_is_as_close_to_float64_as_the_reference(found: dict[str, Found]) -> None:
    """The error is at most twice the reference's own, plus one float32 spacing at the loss, as on one process."""
    truth, reference, fast = (torch.tensor(mean(two), dtype=torch.float64) for two in found["float64"])
    assert (fast - truth).abs().max() <= 2 * (reference - truth).abs().max() + truth.max() * 2.0**-23
    assert not torch.equal(fast, reference)  # the other backend computed it


def test_the_loss_of_a_sharded_bfloat16_run_is_float32(found: dict[str, Found]) -> None:
    """In bfloat16 it would have only 3 digits."""
    (two,) = found["bfloat16"]
    for one in two:
        losses = torch.tensor([*one["losses"], one["eval_loss"]])
        assert one["shards"] and len(losses) == 8
        assert not torch.equal(losses, losses.bfloat16().float())
        assert (losses[:-1] != losses[:-1].bfloat16().float()).all()


def test_two_processes_evaluate_like_one(tmp_path: Path, found: dict[str, Found]) -> None:
    """The accuracy is equal too: the up to two documents that accelerate repeats to fill the last batch count once."""
    with tiny.KeepFloat64():
        expected = pytest.approx(by_hand(texts()), rel=1e-12)
    alone: Any = build(UnslothTrainer, arguments(tmp_path), eval_dataset=texts(), compute_metrics=lambda prediction: {})
    alone.evaluate()
    accuracy = alone.state.log_history[-1]["eval_mean_token_accuracy"]
    (two,) = found["evaluations"]
    for one in two:
        assert len(one) == 24
        for (batching, _, without_metrics), (logged, history) in one.items():
            assert logged["eval_loss"] == expected, batching
            if not without_metrics:
                assert history["eval_mean_token_accuracy"] == accuracy, batching
                assert logged["eval_rows"] == 7 or BATCHINGS[batching].get("eval_packing", True), batching

"""Two processes, started by torchrun or accelerate, on gloo: compared with one, and with plain TRL on its own model."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import rank
from tests.trainer.rank import Run
from tests.trainer.runs import plain_trl

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module"]  # its --cpu starts only one process

# SGD, as AdamW would hide a gradient that is too large or too small by a constant factor.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}

LAUNCHES = {
    "torchrun": (
        TORCHRUN,
        [
            Run("packed", "full", 1, SGD),
            Run("packed", "embedding rate", 4),
            Run("padding-free", "full", 4, SGD),
            Run("padding-free", "lora", 1),
            Run("padded", "embedding rate", 1, resumed=True),
            Run("padded", "lora", 4),
        ],
    ),
    "torchrun, sharded": (
        TORCHRUN,
        [
            Run("packed", "embedding rate", 4, sharded=True, resumed=True),
            Run("padding-free", "full", 1, SGD, sharded=True),
        ],
    ),
    "accelerate": (
        ACCELERATE,
        [Run("packed", "embedding rate", 4), Run("packed", "embedding rate", 4, sharded=True)],
    ),
}


def launch(folder: Path, launcher: list[str], runs: list[Run]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The results of both processes for each run."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "tests.trainer.rank", str(folder), rank.as_json(runs)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(zip(*(torch.load(folder / f"{index}.pt", weights_only=False) for index in (0, 1)), strict=True))


def mean(two: tuple[dict[str, Any], dict[str, Any]]) -> list[float]:
    """The loss over both processes: each divides the sum over its targets by the targets of both, times two."""
    return [(first + second) / 2 for first, second in zip(two[0]["losses"], two[1]["losses"], strict=True)]


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_processes_train_like_one_and_like_plain_trl(tmp_path: Path, name: str) -> None:
    """In float64 only rounding differs, amplified by AdamW to at most 1e-12; a wrong count changes losses by 1e-2."""
    launcher, runs = LAUNCHES[name]
    for run, two in zip(runs, launch(tmp_path, launcher, runs), strict=True):
        one = rank.train(tmp_path / "one", replace(run, sharded=False), 2)
        theirs = plain_trl(tmp_path / "theirs", run.batching, run.trained, **run.given)
        assert len(one["losses"]) >= 20
        assert mean(two) == pytest.approx(one["losses"], rel=1e-9), run
        assert mean(two) == pytest.approx(theirs.losses, rel=1e-9), run
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


def test_fast_on_two_processes_is_as_close_to_float64_as_the_reference(tmp_path: Path) -> None:
    """At most twice the reference's own error, plus one float32 spacing at the loss, as on one process."""
    exact = Run("packed", "embedding rate", 2, {"max_steps": 2, "backend": "reference"})
    plain = replace(exact, dtype="float32")
    fast = replace(plain, options={"max_steps": 2, "backend": "fast"})
    truth, reference, found = (
        torch.tensor(mean(two), dtype=torch.float64) for two in launch(tmp_path, TORCHRUN, [exact, plain, fast])
    )
    assert (found - truth).abs().max() <= 2 * (reference - truth).abs().max() + truth.max() * 2.0**-23
    assert not torch.equal(found, reference)  # the other backend computed it


def test_the_loss_of_a_sharded_bfloat16_run_is_float32(tmp_path: Path) -> None:
    """In bfloat16 it would have only 3 digits."""
    run = Run("packed", "embedding rate", 2, {"max_steps": 4, "bf16": True}, sharded=True, dtype="float32")
    (two,) = launch(tmp_path, TORCHRUN, [run])
    for found in two:
        losses = torch.tensor([*found["losses"], found["eval_loss"]])
        assert found["shards"] and len(losses) == 8
        assert not torch.equal(losses, losses.bfloat16().float())
        assert (losses[:-1] != losses[:-1].bfloat16().float()).all()

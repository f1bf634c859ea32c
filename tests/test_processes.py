"""One process against two, by torchrun and by accelerate, on gloo: the same losses, counts and groups."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import rank

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module"]  # its --cpu starts one process alone


def launch(folder: Path, launcher: list[str], kind: str) -> list[dict[str, Any]]:
    """What each of two processes found."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "tests.rank", str(folder), kind, "1"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{index}-of-2.pt", weights_only=False) for index in (0, 1)]


@pytest.mark.parametrize(
    ("launcher", "kind"),
    [(TORCHRUN, "ddp"), (ACCELERATE, "ddp"), (TORCHRUN, "fsdp2")],
    ids=["torchrun-ddp", "accelerate-ddp", "torchrun-fsdp2"],
)
def test_two_processes_train_as_one(tmp_path: Path, launcher: list[str], kind: str) -> None:
    """Float64, so that only rounding differs, amplified by AdamW to 1e-12 at most; a wrong count would show at 1e-2."""
    two = launch(tmp_path, launcher, kind)
    rank.run(str(tmp_path), "ddp", 2)
    one = torch.load(tmp_path / "0-of-1.pt", weights_only=False)

    # A rank's loss is the sum over its targets by the targets of both, times two: the ranks' mean is the whole.
    means = [(first + second) / 2 for first, second in zip(two[0]["losses"], two[1]["losses"], strict=True)]
    assert means == pytest.approx(one["losses"], rel=1e-9)
    assert len(one["losses"]) == 8
    for other in two:
        assert other["items"] == one["items"] and len(set(one["items"])) > 1
        assert other["groups"] == one["groups"] and {group[0] for group in one["groups"]} == {"base", "embedding"}
        assert (other["shards"] > 0) == (kind == "fsdp2")
        assert not other["logits"] and not one["logits"]
        assert other["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-9)
        assert other["eval_rows"] == one["eval_rows"] == [5]
        for mine, theirs in zip(one["log"], other["log"], strict=True):
            # What is logged goes through float32.
            for name in mine.keys() & {"loss", "num_tokens", "learning_rate", "embedding_learning_rate", "epoch"}:
                assert theirs[name] == pytest.approx(mine[name], rel=2.0**-22), name


def test_sharded_in_bfloat16_the_loss_is_of_float32(tmp_path: Path) -> None:
    """Rounded to bfloat16 it would have 3 digits."""
    for found in launch(tmp_path, TORCHRUN, "fsdp2-bf16"):
        losses = torch.tensor([*found["losses"], found["eval_loss"]])
        assert found["shards"] and len(losses) == 9
        assert not torch.equal(losses, losses.bfloat16().float())
        assert (losses[:-1] != losses[:-1].bfloat16().float()).all()

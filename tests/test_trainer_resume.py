"""A run that is killed goes on as if it had not been."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import arguments, build
from unsloth_fast import UnslothTrainer
from unsloth_fast.checkpoints import last_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

# Six steps of two packed rows, of which an epoch has five.
OPTIONS = {
    "packing": True,
    "max_length": 24,
    "save_strategy": "steps",
    "save_steps": 1,
    "embedding_learning_rate": 1e-4,
}

KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from unsloth_fast import UnslothTrainer
from tests.runs import arguments, build
from tests.test_trainer_resume import OPTIONS

folder, moment, step = sys.argv[1], sys.argv[2], int(sys.argv[3])

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        if moment == "between steps" and state.global_step == step:
            kill()

class Killed(UnslothTrainer):
    def _save_optimizer_and_scheduler(self, *positional):  # after the weights, before all else
        if moment == "while saving" and self.state.global_step == step:
            kill()
        super()._save_optimizer_and_scheduler(*positional)

build(Killed, arguments(folder, **OPTIONS), lora=True, callbacks=[Kill()]).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "step", "left"), [("between steps", 4, 4), ("while saving", 5, 4), ("while saving", 1, None)]
)
def test_after_a_kill_the_next_losses_are_the_same_to_the_bit(
    tmp_path: Path, moment: str, step: int, left: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The last checkpoint that was written to its end counts; half a one is said and left out."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment, str(step)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert (tmp_path / f"checkpoint-{step}").exists()
    resumed = build(UnslothTrainer, arguments(tmp_path, **OPTIONS), lora=True)
    if left is None:
        with pytest.raises(ValueError, match="resume_from_checkpoint: got True; allowed: False, as"):
            resumed.train(resume_from_checkpoint=True)
        return
    resumed.train(resume_from_checkpoint=True)
    assert ("was not written to its end" in caplog.text) == (moment == "while saving")
    whole = build(UnslothTrainer, arguments(tmp_path / "whole", **OPTIONS), lora=True)
    whole.train()
    assert resumed.losses == whole.losses[left:]
    assert len(whole.losses) == 6
    names = ("step", "loss", "grad_norm", "learning_rate", "embedding_learning_rate", "num_tokens")
    logs = [[[log.get(name) for name in names] for log in run.state.log_history[:6]] for run in (resumed, whole)]
    assert logs[0] == logs[1]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_last_checkpoint_is_that_of_the_most_steps(tmp_path: Path) -> None:
    """By number, not by name; none in an empty folder or in none at all."""
    assert last_checkpoint(tmp_path) is last_checkpoint(tmp_path / "none") is None
    for step, text in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")

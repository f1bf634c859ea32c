"""A run that is killed and resumed gives the bits of one that was not interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset

from tests import tiny
from tests.processes import PATIENCE
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer
from unsloth_fast.hooks.checkpoints import last_checkpoint, passes_of_stream

pytestmark = pytest.mark.filterwarnings("ignore")

# Six steps of two packed rows each; an epoch has five steps.
OPTIONS = {
    "packing": True,
    "max_length": 24,
    "save_strategy": "steps",
    "save_steps": 1,
    "embedding_learning_rate": 1e-4,
}

STOPS = [("between steps", 4), ("while saving", 5), ("while saving", 1)]

# One process imports what trains, and forks one that is killed per stop.
KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from unsloth_fast import UnslothTrainer
from tests.trainer.runs import arguments, build
from tests.trainer.test_resume import OPTIONS, STOPS

for index, (moment, step) in enumerate(STOPS):
    if (child := os.fork()) == 0:
        break
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
else:
    sys.exit()

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        if moment == "between steps" and state.global_step == step:
            kill()

class Killed(UnslothTrainer):
    def _save_optimizer_and_scheduler(self, *positional):  # after the weights, before the rest
        if moment == "while saving" and self.state.global_step == step:
            kill()
        super()._save_optimizer_and_scheduler(*positional)

build(Killed, arguments(Path(sys.argv[1]) / str(index), **OPTIONS), lora=True, callbacks=[Kill()]).train()
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of the killed runs."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [folder / str(index) for index, _ in enumerate(STOPS)]


@pytest.mark.slow
@pytest.mark.parametrize(("index", "left"), enumerate((4, 4, None)))
def test_a_killed_run_resumes_with_the_same_bits(
    tmp_path: Path, killed: list[Path], index: int, left: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It resumes from its last complete checkpoint. An incomplete one is logged and ignored."""
    (moment, step), folder = STOPS[index], killed[index]
    assert (folder / f"checkpoint-{step}").exists()
    resumed = build(UnslothTrainer, arguments(folder, **OPTIONS), lora=True)
    if left is None:
        with pytest.raises(ValueError, match="resume_from_checkpoint: got True; allowed: False, as"):
            resumed.train(resume_from_checkpoint=True)
        return
    resumed.train(resume_from_checkpoint=True)
    assert ("it is incomplete" in caplog.text) == (moment == "while saving")
    whole = build(UnslothTrainer, arguments(tmp_path / "whole", **OPTIONS), lora=True)
    whole.train()
    assert resumed.losses == whole.losses[left:]
    assert len(whole.losses) == 6
    names = ("step", "loss", "grad_norm", "learning_rate", "embedding_learning_rate", "num_tokens")
    logs = [[[log.get(name) for name in names] for log in run.state.log_history[:6]] for run in (resumed, whole)]
    assert logs[0] == logs[1]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_last_checkpoint_has_the_most_steps(tmp_path: Path) -> None:
    """Checkpoints are ordered by number, not by name; an empty or a missing folder gives None."""
    assert last_checkpoint(tmp_path) is last_checkpoint(tmp_path / "none") is None
    texts = ('{"global_step": 9}', '{"global_step": 10}', '{"glob', "{}", '{"global_step": null}', "[]")
    for step, text in enumerate(texts, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("text", [None, "", "{}", '{"global_step": 1'])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, text: str | None) -> None:
    """It is refused before anything is read from it."""
    trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1))
    trainer.train()
    state = tmp_path / "checkpoint-1" / "trainer_state.json"
    state.unlink()
    if text is not None:
        state.write_text(text)
    for folder in (str(state.parent), state.parent):
        with pytest.raises(
            ValueError, match=r"^resume_from_checkpoint: got '.*checkpoint-1'; allowed: a folder with a complete"
        ):
            trainer.train(resume_from_checkpoint=folder)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: got True; allowed: False, as"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_resumes_at_the_right_batch(tmp_path: Path, packing: bool) -> None:
    """The bits are the same, in the first and in the second pass over the stream."""

    def run(folder: Path) -> UnslothTrainer:
        return UnslothTrainer(
            model=tiny.model(dtype=torch.float64),
            args=arguments(folder, packing=packing, max_length=24, max_steps=8, save_strategy="steps", save_steps=1),
            train_dataset=IterableDataset.from_generator(lambda: ({"text": text} for text in tiny.texts(9))),
            processing_class=tiny.tokenizer(),
        )

    whole = run(tmp_path)
    whole.train()
    epochs = [log["epoch"] for log in whole.state.log_history[:8]]
    assert epochs[1] < 1 < epochs[5]
    for step in (2, 5, 6):
        resumed = run(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        names = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "epoch")
        logs = [[[log[name] for name in names] for log in run.state.log_history[:8]] for run in (resumed, whole)]
        assert logs[0] == logs[1]
        for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, (0, 0)), (0.5, (0, 4)), (1.0, (0, 8)), (1.125, (1, 1)), (3.5, (3, 4))]
)
def test_the_position_in_a_stream_follows_from_the_epoch(
    tmp_path: Path, epoch: float, expected: tuple[int, int]
) -> None:
    """transformers counts max_steps as one pass. An epoch of 1.0 is the end of the first pass, not a second one."""
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "max_steps": 8}))
    assert passes_of_stream(tmp_path) == expected

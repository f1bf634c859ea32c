"""A training whose layers are recorded as CUDA graphs has the losses of one without; the argument is checked."""

import logging
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerCallback

from tests import tiny
from tests.models.recorder import ON_GPU, attention, stack_graphs, use_recorder
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer
from unsloth_fast import trainer as trainer_module
from unsloth_fast.hooks.cuda_graphs import recorded_layers

pytestmark = pytest.mark.filterwarnings("ignore")
DTYPE = torch.float32 if ON_GPU else torch.float64


class WithReference(UnslothTrainer):
    """A trainer whose loss compares the model with itself without the adapter."""

    def compute_loss(self, model: Any, inputs: Any, *positional: Any, **keywords: Any) -> Any:
        """The loss of the batch, and the distance of the probabilities, from another forward pass of the model."""
        loss = super().compute_loss(model, inputs, *positional, **keywords)
        batch = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        ours = model(**batch).logits.softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            theirs = model(**batch).logits.softmax(-1)
        return loss + (ours - theirs).square().sum(-1).mean()


def losses(
    folder: Path, wanted: bool | None, kind: type = UnslothTrainer, **options: Any
) -> tuple[list[float], list[int]]:
    """The losses of the microbatches, and the sizes that were recorded until the last one."""
    sizes: list[int] = []
    own = {"backend": "fast", "use_cpu": False, "bf16": False} if ON_GPU else {}
    trainer = build(kind, arguments(folder, cuda_graphs=wanted, **own, **options), DTYPE, lora=True)
    compute_loss = trainer.compute_loss

    def counted(*positional: Any, **keywords: Any) -> Any:
        found = stack_graphs(trainer.model)
        sizes[:] = [] if found is None else list(found._recordings)
        return compute_loss(*positional, **keywords)

    trainer.compute_loss = counted
    with nullcontext() if ON_GPU else tiny.KeepFloat64():
        trainer.train()
    assert stack_graphs(trainer.model) is None
    return trainer.losses, sizes


@pytest.mark.parametrize("kind", [UnslothTrainer, WithReference])
def test_a_recorded_training_has_the_losses_of_another(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Microbatches of several sizes are padded, and gradients are accumulated."""
    use_recorder(monkeypatch)
    if not ON_GPU:
        monkeypatch.setattr("unsloth_ref.kernels.packed_attention", attention)
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "embedding_learning_rate": 1e-4}
    expected, none = losses(tmp_path / "a", False, kind, **options)
    found, sizes = losses(tmp_path / "b", True, kind, **options)
    # While an earlier pass waits for its backward, CUDA refuses the recording: gradients meet in that pass's stream.
    assert (sizes or (ON_GPU and kind is WithReference)) and not none
    assert found == pytest.approx(expected, rel=1e-5 if ON_GPU else 1e-12)


class Busy(TrainerCallback):
    """Generates, computes another loss with its gradients and switches the adapter off between steps."""

    def __init__(self) -> None:
        self.recordings = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Between the steps, in which nothing of it may be seen."""
        ids = torch.tensor([[5, 6, 7]], device=model.device)
        model.eval()
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        model.train()
        with model.disable_adapter():
            model(input_ids=ids, use_cache=False)
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        model.zero_grad()
        self.recordings += len(stack_graphs(model)._recordings) if stack_graphs(model) else 0


def test_callbacks_evaluations_and_a_resumed_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change nothing of what is replayed, and nothing of them is."""
    use_recorder(monkeypatch)
    if not ON_GPU:
        monkeypatch.setattr("unsloth_ref.kernels.packed_attention", attention)
    own = {"backend": "fast", "use_cpu": False} if ON_GPU else {}
    options = own | {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    found = []
    for wanted in (False, True):
        folder = tmp_path / str(wanted)
        for resumed in (None, True):
            args = arguments(folder, cuda_graphs=wanted, per_device_eval_batch_size=3, **options)
            busy = Busy()
            data = {"eval_dataset": Dataset.from_dict({"text": tiny.texts(5, seed=1)}), "callbacks": [busy]}
            trainer = build(UnslothTrainer, args, DTYPE, lora=True, **data)
            with nullcontext() if ON_GPU else tiny.KeepFloat64():
                trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resumed else None)
            assert busy.recordings >= (2 if wanted else 0)
            evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
            found.append([*trainer.losses, *evaluated])
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        assert one == pytest.approx(other, rel=1e-5 if ON_GPU else 1e-12)


@pytest.mark.parametrize("place", ["forward_with_loss", "backward"])
def test_a_step_that_runs_out_of_memory_is_repeated(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is repeated without the recordings, whether the head or the backward pass needs their memory."""
    use_recorder(monkeypatch)
    caplog.set_level(logging.INFO, "unsloth_fast")
    if not ON_GPU:
        monkeypatch.setattr("unsloth_ref.kernels.packed_attention", attention)
    expected, _ = losses(tmp_path / "a", False)
    trainers: list[Any] = []

    class Full(UnslothTrainer):
        def training_step(self, *positional: Any, **keywords: Any) -> Any:
            trainers[:] = [self]
            return super().training_step(*positional, **keywords)

    def failing(own: Any) -> Any:
        def call(*positional: Any, **keywords: Any) -> Any:
            result = own(*positional, **keywords)
            if stack_graphs(trainers[0].model)._recordings:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        return call

    owner: Any = Accelerator if place == "backward" else trainer_module
    monkeypatch.setattr(owner, place, failing(getattr(owner, place)))
    found, _ = losses(tmp_path / "b", True, Full)
    assert "out of memory beside the recordings" in caplog.text
    found = found[:1] + [loss for before, loss in pairwise(found) if loss != before]  # the repeated step has the same
    assert found == pytest.approx(expected, rel=1e-5 if ON_GPU else 1e-12)


def watched(folder: Path, wanted: bool | None, **options: Any) -> list[Any]:
    """The graphs of the model in each step of a short training."""
    trainer = build(UnslothTrainer, arguments(folder, cuda_graphs=wanted, max_steps=1, **options), lora=True)
    compute_loss, found = trainer.compute_loss, []

    def watched(*positional: Any, **keywords: Any) -> Any:
        found.append(stack_graphs(trainer.model))
        return compute_loss(*positional, **keywords)

    trainer.compute_loss = watched
    with tiny.KeepFloat64():
        trainer.train()
    return found


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """The levels and reasons of what the log has of layers that are not recorded."""
    words = "the layers are launched one by one: "
    found = [(record.levelno, record.getMessage()) for record in caplog.records if words in record.getMessage()]
    return [(level, message.partition(words)[2]) for level, message in found]


@pytest.mark.parametrize(("wanted", "level"), [(True, logging.WARNING), (None, logging.INFO)])
def test_what_forbids_graphs_is_logged_once(
    wanted: bool | None, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under FSDP and DeepSpeed a process has all weights of a layer only while it runs; batches may have padding."""
    caplog.set_level(logging.INFO, "unsloth_fast")
    own = {"use_cpu": not ON_GPU}
    use_recorder(monkeypatch)
    assert any(watched(tmp_path, wanted, padding_free=False, gradient_accumulation_steps=2, **own))
    assert lines(caplog) == [(level, "a call with attention_mask")]
    caplog.clear()
    monkeypatch.setattr("unsloth_fast.hooks.cuda_graphs.UNSHARDED", ())
    assert not any(watched(tmp_path, wanted, **own))
    assert lines(caplog) == [(level, "the training is distributed by NO")]
    caplog.clear()
    monkeypatch.setattr("unsloth_fast.hooks.cuda_graphs.recording.DEVICE", "elsewhere")
    assert not any(watched(tmp_path, wanted, **own))
    assert lines(caplog) == [(level, f"the device is {'cuda' if ON_GPU else 'cpu'!r}")]
    caplog.clear()
    assert not any(watched(tmp_path, False, **own)) and not lines(caplog)


def test_a_model_without_packed_attention_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model with an attention of its own is such a model."""
    use_recorder(monkeypatch)
    monkeypatch.setattr("unsloth_fast.hooks.cuda_graphs.documents_of", lambda stack: None)
    watched(tmp_path, True, use_cpu=not ON_GPU)
    assert lines(caplog) == [(logging.WARNING, "the model's attention takes no packed batches")]


@pytest.mark.parametrize(("name", "value"), [("verify_every", 2), ("torch_compile", True)])
def test_what_needs_the_python_of_the_layers_excludes_graphs(
    tmp_path: Path, name: str, value: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for with them, they are refused; otherwise nothing is recorded, and the log says why."""
    use_recorder(monkeypatch)
    caplog.set_level(logging.INFO, "unsloth_fast")
    trainer = build(UnslothTrainer, arguments(tmp_path, cuda_graphs=True), lora=True)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"cuda_graphs: got True with {name}={value}; allowed: False, or None"):
        trainer.train()
    trainer.args.cuda_graphs = None
    with recorded_layers(trainer) as found:
        assert not found
    assert lines(caplog) == [(logging.INFO, f"{name}={value}")]


def test_several_gpus_in_one_process_exclude_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of torch.nn.DataParallel would record at the same time."""
    use_recorder(monkeypatch)
    trainer = build(UnslothTrainer, arguments(tmp_path, cuda_graphs=True, use_cpu=not ON_GPU), lora=True)
    trainer.args._n_gpu = 2
    with recorded_layers(trainer) as found:
        assert not found and stack_graphs(trainer.model) is None


def test_the_argument_is_checked(tmp_path: Path) -> None:
    """A word is no switch."""
    with pytest.raises(ValueError, match="cuda_graphs: got 'no'; allowed: True, False, or None"):
        arguments(tmp_path, cuda_graphs="no")

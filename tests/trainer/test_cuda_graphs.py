"""A training whose layers are recorded as CUDA graphs has the losses of one without; the argument is checked."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.models.recorder import ON_GPU, attention, stack_graphs, use_recorder
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer
from unsloth_fast.cuda_graphs import recorded_layers

pytestmark = pytest.mark.filterwarnings("ignore")


class WithReference(UnslothTrainer):
    """With a loss that compares the model with itself without the adapter."""

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
    dtype = torch.float32 if ON_GPU else torch.float64
    trainer = build(kind, arguments(folder, cuda_graphs=wanted, **own, **options), dtype, lora=True)
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
    """With microbatches of several sizes, which are padded, and gradients that are accumulated."""
    use_recorder(monkeypatch)
    if not ON_GPU:
        monkeypatch.setattr("unsloth_ref.kernels.packed_attention", attention)
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "embedding_learning_rate": 1e-4}
    expected, none = losses(tmp_path / "a", False, kind, **options)
    found, sizes = losses(tmp_path / "b", True, kind, **options)
    assert sizes and not none
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
    monkeypatch.setattr("unsloth_fast.cuda_graphs.WHOLE", ())
    assert not any(watched(tmp_path, wanted, **own))
    assert lines(caplog) == [(level, "the training is distributed by NO")]
    caplog.clear()
    monkeypatch.setattr("unsloth_fast.cuda_graphs.recording.DEVICE", "elsewhere")
    assert not any(watched(tmp_path, wanted, **own))
    assert lines(caplog) == [(level, f"the device is a {'cuda' if ON_GPU else 'cpu'}")]
    caplog.clear()
    assert not any(watched(tmp_path, False, **own)) and not lines(caplog)


def test_a_model_without_packed_attention_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one with an attention of its own."""
    use_recorder(monkeypatch)
    monkeypatch.setattr("unsloth_fast.cuda_graphs.documents_of", lambda stack: None)
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

"""A training whose layers are recorded as CUDA graphs has the losses of one without; the argument is checked."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.models.test_graphs import ON_GPU, attention, capture, stack_graphs
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer
from unsloth_fast.config import wants_graphs
from unsloth_fast.models import graphs

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
    with tiny.KeepFloat64():
        trainer.train()
    assert stack_graphs(trainer.model) is None
    return trainer.losses, sizes


@pytest.mark.parametrize("kind", [UnslothTrainer, WithReference])
def test_a_recorded_training_has_the_losses_of_another(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With microbatches of several sizes, which are padded, and gradients that are accumulated."""
    if not ON_GPU:
        monkeypatch.setattr(graphs, "DEVICE", "cpu")
        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(graphs, "other_stream", nullcontext)
        monkeypatch.setattr("unsloth_ref.kernels.packed_attention", attention)
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "embedding_learning_rate": 1e-4}
    expected, none = losses(tmp_path / "a", False, kind, **options)
    found, sizes = losses(tmp_path / "b", True, kind, **options)
    assert sizes and not none
    assert found == pytest.approx(expected, rel=1e-5 if ON_GPU else 1e-12)


def test_nothing_is_recorded_of_a_model_that_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP and DeepSpeed a process has all weights of a layer only while it runs."""
    monkeypatch.setattr("unsloth_fast.trainer.WHOLE", ())
    trainer = build(UnslothTrainer, arguments(tmp_path, cuda_graphs=True, max_steps=1), lora=True)
    compute_loss, found = trainer.compute_loss, []

    def watched(*positional: Any, **keywords: Any) -> Any:
        found.append(stack_graphs(trainer.model))
        return compute_loss(*positional, **keywords)

    trainer.compute_loss = watched
    trainer.train()
    assert found and not any(found)


@pytest.mark.parametrize(("name", "value"), [("verify_every", 2), ("torch_compile", True)])
def test_what_needs_the_python_of_the_layers_excludes_graphs(tmp_path: Path, name: str, value: Any) -> None:
    """Asked for with them, they are refused; otherwise nothing is recorded."""
    args = arguments(tmp_path, cuda_graphs=True)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"cuda_graphs: got True with {name}={value}; allowed: False, or None"):
        wants_graphs(args)
    args.cuda_graphs = None
    assert not wants_graphs(args)


def test_nothing_is_recorded_on_a_cpu(tmp_path: Path) -> None:
    """Unless it is asked for; then the log says why not."""
    assert not wants_graphs(arguments(tmp_path))
    with pytest.raises(ValueError, match="cuda_graphs: got 'no'; allowed: True, False, or None"):
        arguments(tmp_path, cuda_graphs="no")

"""Mixtures of experts train with a load-balancing loss as with TRL, whose layers are recorded or not."""

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.models import zoo
from tests.models.recorder import ON_GPU, RECORDABLE, stack_graphs, use_recorder
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(SFTConfig, "router_aux_loss_coef"), reason="this TRL adds no load-balancing loss"),
]
FAST: dict[str, Any] = {"backend": "fast", "use_cpu": False} if ON_GPU else {}


def trained(folder: Path, name: str, kind: type = UnslothTrainer, lora: bool = False, **options: Any) -> Any:
    """A trainer after four steps, and an evaluation."""
    taken = SFTConfig if kind is SFTTrainer else UnslothTrainingArguments
    args = arguments(folder, taken, router_aux_loss_coef=0.5, max_steps=4, **options)
    data = Dataset.from_dict({"text": tiny.texts(5, seed=1)})
    model = zoo.model(name).float()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if lora else model
    trainer = build(kind, args, model=model, eval_dataset=data)
    trainer.sizes = []
    compute_loss = trainer.compute_loss

    def watched(*positional: Any, **keywords: Any) -> Any:
        graphs = stack_graphs(trainer.model) if kind is UnslothTrainer else None
        trainer.sizes[:] = trainer.sizes if graphs is None else list(graphs._recordings)
        return compute_loss(*positional, **keywords)

    trainer.compute_loss = watched
    trainer.train()
    trainer.evaluate()
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    """The values of a number in the log."""
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_losses_are_those_of_trl(tmp_path: Path, padding_free: bool, accumulated: int) -> None:
    """This holds in training and in an evaluation, for the load-balancing losses in the log and for the weights too."""
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulated, "per_device_eval_batch_size": 8}
    theirs = trained(tmp_path / "a", "qwen3_moe", SFTTrainer, use_cpu=True, **options)
    ours = trained(tmp_path / "b", "qwen3_moe", padding_free=padding_free, **options)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    for name in ("loss", "aux_loss", "eval_loss", "eval_aux_loss"):
        assert len(logged(ours, name)) == (1 if "eval" in name else 4)
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4), name
    assert not logged(ours, "entropy")  # which would need the logits
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-4
    assert ours.model.config.output_router_logits is False


@pytest.fixture
def _recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recorder(monkeypatch)
    if not ON_GPU:
        for operation, function in RECORDABLE.items():
            monkeypatch.setattr(f"unsloth_ref.kernels.{operation}", function)


@pytest.mark.usefixtures("_recorder")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_recorded_experts_have_the_losses_of_others(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model around the recorded layers computes their load-balancing loss."""
    caplog.set_level(logging.INFO, "unsloth_fast")
    options = FAST | {"gradient_accumulation_steps": 2, "padding_free": True}
    expected = trained(tmp_path / "a", name, cuda_graphs=False, **options)
    found = trained(tmp_path / "b", name, **options)
    assert found.sizes == [256] and not expected.sizes
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert logged(found, "aux_loss") == pytest.approx(logged(expected, "aux_loss"), rel=1e-4)
    assert "launched one by one" not in caplog.text


@pytest.mark.usefixtures("_recorder")
def test_experts_under_adapters_are_recorded(tmp_path: Path) -> None:
    options = FAST | {"gradient_accumulation_steps": 2, "padding_free": True}
    assert trained(tmp_path, "qwen3_moe", lora=True, **options).sizes == [256]


def test_the_weight_is_that_of_the_arguments(tmp_path: Path) -> None:
    """The sum of the log is that of the two losses."""
    trainer = trained(tmp_path, "qwen3_moe")
    model = zoo.model("qwen3_moe")
    without = UnslothTrainer(
        model,
        arguments(tmp_path, router_aux_loss_coef=0.0, max_steps=1),
        train_dataset=Dataset.from_dict({"text": tiny.texts(18)}),
        processing_class=tiny.tokenizer(),
    )
    without.train()
    first = logged(trainer, "loss")[0] - 0.5 * logged(trainer, "aux_loss")[0]
    assert first == pytest.approx(logged(without, "loss")[0], rel=1e-4)
    assert not logged(without, "aux_loss")

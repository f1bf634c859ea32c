"""A model with modules that no library has: documents share a row only where a few tokens show that they may."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tests import tiny
from tests.models.joining import APART, JOINING, with_module
from tests.models.test_attention import LENGTHS, assert_near, documents, gradients_of, loss_of, separately
from tests.trainer.runs import arguments
from unsloth_fast import UnslothTrainer, backends
from unsloth_fast.models import place
from unsloth_fast.models.apart import joined_documents

BATCH = tiny.packed(LENGTHS)


def trained(model: PreTrainedModel, folder: Path) -> tuple[UnslothTrainer, torch.Tensor, dict[str, torch.Tensor]]:
    """The trainer, the loss of one batch of four documents, and its gradients."""
    rows = [document[0].tolist() for document in documents(BATCH)]
    args = arguments(folder, per_device_train_batch_size=len(rows), max_length=64)
    data = Dataset.from_dict({"input_ids": rows})
    trainer = UnslothTrainer(model, args, train_dataset=data, processing_class=tiny.tokenizer())
    model.zero_grad()
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(sum(LENGTHS) - len(LENGTHS)))
    loss.backward()
    return trainer, loss.detach(), gradients_of(model)


@pytest.mark.parametrize("name", [*JOINING, *APART])
def test_the_loss_and_gradients_are_those_of_documents_alone(name: str, tmp_path: Path) -> None:
    """In a packed row, or where that would join documents in padded rows."""
    model = (JOINING | APART)[name]()
    with tiny.KeepFloat64():
        logits, expected = separately(model, BATCH)
        rows = zip(logits.split(LENGTHS, 1), documents(BATCH), strict=True)
        count = sum(LENGTHS) - len(LENGTHS)
        loss = sum(loss_of(*row) for row in rows) / count
        trainer, seen, gradients = trained(model, tmp_path)
    assert trainer.padding_free == (name in APART)
    if name == "experts that choose tokens":  # in padded rows, too
        return
    assert_near(seen, torch.as_tensor(loss), 1e-13)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values()) / count
    for key, gradient in gradients.items():
        scale = max(expected[key].abs().max() / count, 1e-3 * largest)
        assert (gradient - expected[key] / count).abs().max() <= 1e-11 * scale, key


def test_the_reason_names_the_modules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And what was raised, if the row cannot run."""
    joined = joined_documents(JOINING["an attention of its own"]())
    assert joined == "a document in a row has other logits than alone; modules that no library has: OwnAttention"
    failed = joined_documents(JOINING["a mask of another configuration"]())
    assert failed is not None and failed.startswith("a row of two short documents raises ")
    with caplog.at_level("INFO", logger="unsloth_fast"):
        trained(JOINING["positions of the row"](), tmp_path)
    assert "modules that no library has: Placed" in caplog.text


@pytest.mark.parametrize("placed", [False, True])
def test_the_model_does_not_change(placed: bool) -> None:
    """Nothing stays of what was placed for the check, nor of the weights that were 0; random numbers neither."""
    model = JOINING["a convolution that is 0"]()
    if placed:
        place(model, backends.resolve("reference"))
    forwards = [vars(module).get("forward") for module in model.modules()]
    before: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation, state, modes = model.config._attn_implementation, torch.get_rng_state(), model.training
    assert joined_documents(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert (model.config._attn_implementation, model.training) == (implementation, modes)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_of_libraries_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is known; so is that of operations that are placed."""
    model = tiny.model()
    place(model, backends.resolve("reference"))
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(TypeError):
        model(**BATCH)
    monkeypatch.undo()
    runs: list[object] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    assert joined_documents(model) is None
    assert runs == []


def test_no_gradient_is_left() -> None:
    """The check runs without gradients."""
    model = with_module("model.norm", APART["a norm with a factor"]().model.norm.__class__)
    assert joined_documents(model) is None
    assert gradients_of(model) == {}

"""Gradient checkpointing through FastLanguageModel and the trainer: the same bits in less memory."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments
from trl import SFTConfig

from tests import tiny
from tests.models.adapted import TOKENS, layers_of, load, loss_and_gradients
from unsloth_fast import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments
from unsloth_fast.models import checkpointing
from unsloth_fast.models.head import without_adapter


@pytest.mark.parametrize("how", [True, "unsloth"])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, how: bool | str, load_in_4bit: bool) -> None:
    """Loss and gradients keep their bits, whether embeddings are trained or not."""
    folder = tiny.folder(tmp_path)
    for saved in (None, ["embed_tokens", "lm_head"]):
        results = []
        for checkpointed in (False, how):
            model, _ = load(folder, load_in_4bit=load_in_4bit)
            options = {"modules_to_save": saved, "use_gradient_checkpointing": checkpointed}
            model = FastLanguageModel.get_peft_model(model, **options)
            assert all(layer.gradient_checkpointing == bool(checkpointed) for layer in layers_of(model))
            results.append(loss_and_gradients(model))
        (loss, gradients), (expected_loss, expected) = results
        assert torch.equal(loss, expected_loss) and gradients.keys() == expected.keys()
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


def test_offloading_moves_only_the_inputs_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor per layer goes to the host and back, even after checkpointing is enabled a second time.

    torch 2.11 also saves an empty tensor per layer.
    """
    sent: list[tuple[int, ...]] = []
    fetched: list[tuple[int, ...]] = []

    def to_host(tensor: Tensor) -> Tensor:
        sent.extend([tuple(tensor.shape)] if tensor.numel() else [])
        return tensor.clone()

    def from_host(packed: Tensor) -> Tensor:
        fetched.extend([tuple(packed.shape)] if packed.numel() else [])
        return packed

    monkeypatch.setattr(checkpointing, "to_host", to_host)
    monkeypatch.setattr(checkpointing, "from_host", from_host)
    model = FastLanguageModel.get_peft_model(tiny.model(), use_gradient_checkpointing="unsloth")
    loss, gradients = loss_and_gradients(model)
    assert sent == fetched == [(*TOKENS.shape, 32)] * 2
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, gradients_again = loss_and_gradients(model)
    assert len(sent) == 4 and torch.equal(again, loss)
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in gradients_again.items())
    FastLanguageModel.for_training(model, use_gradient_checkpointing=True)
    loss_and_gradients(model)
    assert len(sent) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_on_a_gpu_changes_no_bit_and_saves_the_inputs() -> None:
    """The tensors that sixteen layers save for the backward pass are not in GPU memory."""
    model = tiny.model(num_hidden_layers=16, hidden_size=256).cuda()
    # The backward passes of SDPA and of the embedding sum in an order that varies from run to run.
    model.set_attn_implementation("eager")
    model.model.embed_tokens.requires_grad_(False)
    tokens = torch.randint(3, 48, (1, 4096), device="cuda")
    results, kept = [], []
    for how in (True, "unsloth"):
        FastLanguageModel.for_training(model, use_gradient_checkpointing=how)
        model.zero_grad()
        hidden = model.model(tokens).last_hidden_state
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated())
        hidden.square().sum().backward()
        results.append([p.grad.clone() for p in model.model.layers.parameters()])
        del hidden
    assert all(map(torch.equal, *results))
    assert kept[0] - kept[1] > 14 * 4096 * 256 * 4 - len(results[0]) * 2**20


@pytest.mark.parametrize(
    ("asked", "args_class", "given", "expected"),
    [
        (False, UnslothTrainingArguments, {}, False),
        (True, UnslothTrainingArguments, {}, True),
        ("unsloth", UnslothTrainingArguments, {}, True),
        (None, UnslothTrainingArguments, {}, True),
        (False, UnslothTrainingArguments, {"gradient_checkpointing": True}, True),
        ("unsloth", UnslothTrainingArguments, {"gradient_checkpointing": False}, False),
        ("unsloth", UnslothTrainingArguments, {"activation_checkpointing": False}, False),
        (None, UnslothTrainingArguments, {"gradient_checkpointing": False}, False),
        (False, SFTConfig, {}, False),
        (None, SFTConfig, {}, True),
        ("unsloth", SFTConfig, {"gradient_checkpointing": False}, False),
        ("unsloth", TrainingArguments, {}, True),
        (False, TrainingArguments, {"gradient_checkpointing": True}, True),
        (None, TrainingArguments, {}, False),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_arguments_decide_on_checkpointing_or_else_the_model(
    tmp_path: Path, asked: bool | str | None, args_class: type, given: dict[str, bool], expected: bool, adapted: bool
) -> None:
    """The state is checked after training; the user's arguments do not change."""
    if "activation_checkpointing" in given and not hasattr(TrainingArguments, "activation_checkpointing"):
        pytest.skip("an older transformers")
    folder = tiny.folder(tmp_path)
    model, tokenizer = load(folder, **({} if asked is None else {"use_gradient_checkpointing": asked}))
    if adapted and asked is not None:
        model = FastLanguageModel.get_peft_model(model)
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    args = args_class(str(tmp_path), **plain | given)
    before = args.to_dict()
    texts = Dataset.from_dict({"text": tiny.texts(4)})
    trainer = UnslothTrainer(model, args, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    assert {layer.gradient_checkpointing for layer in layers_of(trainer.model)} == {expected}
    assert args.to_dict() == before
    assert ("_set_gradient_checkpointing" in vars(without_adapter(model))) == (asked == "unsloth")


def test_checkpointing_as_a_keyword_of_the_trainer(tmp_path: Path) -> None:
    """Older releases of TRL took it as a keyword."""
    model, tokenizer = load(tiny.folder(tmp_path))
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=1)
    texts = Dataset.from_dict({"text": tiny.texts(4)})
    options = {"train_dataset": texts, "processing_class": tokenizer, "gradient_checkpointing": False}
    trainer = UnslothTrainer(model, args, **options)
    trainer.train()
    assert not any(layer.gradient_checkpointing for layer in layers_of(trainer.model))

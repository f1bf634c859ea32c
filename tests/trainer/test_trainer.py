"""The trainer compared with plain TRL on the unmodified model, and with losses and gradients computed by torch."""

import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.trainer.runs import BATCHINGS, SGD, TRAINED, arguments, build, plain_trl, textbook
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments

# TRL warns of deprecated options and peft of tied weights.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("batching", BATCHINGS)
def test_losses_equal_plain_trl_in_float64(tmp_path: Path, batching: str, trained: str, accumulation: int) -> None:
    """20 steps over texts of 1 to 20 words agree in every microbatch. An epoch has nine microbatches: one is left over.

    Theirs is TRL's trainer on Hugging Face's own model. Its batches are padded, or packed by TRL; its loss is torch's
    cross entropy of the logits; its optimizer is grouped by name. Rounding in float64 is 1e-16. A gradient that should
    be 0 is 1e-17 by rounding; AdamW divides it by its eps, 1e-8, and moves the parameter by 1e-9 of the learning rate
    1e-3. So losses agree to 1e-12, and 1e-9 leaves room for sums.
    """
    options = {"gradient_accumulation_steps": accumulation, "max_length": 24, "max_steps": 20}
    with tiny.KeepFloat64():
        args = arguments(tmp_path, **options | BATCHINGS[batching] | TRAINED[trained])
        ours = build(UnslothTrainer, args, lora=trained == "lora")
        ours.train()
    theirs = plain_trl(tmp_path, batching, trained, **options)
    assert len(ours.losses) >= 20
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)


def test_losses_equal_the_fused_head_of_trl(tmp_path: Path) -> None:
    """TRL's default computes in float32: a sum over 48 words rounds six times, exp, log and two differences four."""
    options = {"gradient_accumulation_steps": 4}
    with tiny.KeepFloat64():
        ours = build(UnslothTrainer, arguments(tmp_path, **options))
        ours.train()
        theirs = build(SFTTrainer, arguments(tmp_path, SFTConfig, **options))
        theirs.train()
    assert ours.losses == pytest.approx(theirs.losses, rel=10 * 2.0**-24)
    for our_log, their_log in list(zip(ours.state.log_history, theirs.state.log_history, strict=True))[:6]:
        # A logged loss is a sum in float32 over the 4 microbatches, which rounds four more times.
        for name in ("loss", "learning_rate", "num_tokens", "epoch"):
            assert our_log[name] == pytest.approx(their_log[name], rel=14 * 2.0**-24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batching", "trained", "accumulation"),
    [("packed", "full", 1), *((batching, "embedding rate", 4) for batching in BATCHINGS)],
)
def test_fast_is_as_close_to_float64_as_the_reference(
    tmp_path: Path, batching: str, trained: str, accumulation: int
) -> None:
    """In two float32 steps the error is at most twice the reference's own, plus one float32 spacing at the loss.

    An epoch has five microbatches, of two texts or one packed row each, so the second step of four has only one.
    """
    losses = {}
    for spec, dtype in (("reference", torch.float64), ("reference", torch.float32), ("fast", torch.float32)):
        options = {"max_length": 24, "max_steps": 2, "gradient_accumulation_steps": accumulation}
        options |= {"per_device_train_batch_size": 1 if batching == "packed" else 2}
        options |= {"use_cpu": not torch.cuda.is_available(), "backend": spec}
        args = arguments(tmp_path, **options | BATCHINGS[batching] | TRAINED[trained])
        with tiny.KeepFloat64() if dtype == torch.float64 else nullcontext():
            trainer = build(UnslothTrainer, args, dtype, texts=10)
            trainer.train()
        placed = trainer.model.model.norm.forward.__func__.__closure__
        assert trainer.backend.kernels.rms_norm in [cell.cell_contents for cell in placed]
        losses[spec, dtype] = torch.tensor(trainer.losses, dtype=torch.float64)
        assert len(trainer.losses) == (5 if accumulation == 4 else 2)
    truth = losses["reference", torch.float64]
    allowed = 2 * (losses["reference", torch.float32] - truth).abs().max() + truth.max() * 2.0**-23
    assert (losses["fast", torch.float32] - truth).abs().max() <= allowed
    assert not torch.equal(losses["fast", torch.float32], truth)  # the fast backend computed in float32


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_in_bfloat16_is_as_close_to_float32_as_plain_trl(tmp_path: Path, batching: str, lora: bool) -> None:
    """Both round, at other places: the error of all gradients is at most 1.5 times TRL's, as that of an operation."""

    def gradients(kind: type, config: type, **options: Any) -> Tensor:
        torch.manual_seed(0)  # for the adapter
        trainer = build(kind, arguments(tmp_path, config, **SGD | options), torch.float32, lora, texts=8)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
        after = trainer.model.named_parameters()
        return torch.cat([(before[name] - weight).detach().flatten() for name, weight in after])

    options = {"per_device_train_batch_size": 8, "max_length": 168}  # all texts in one batch, however they are packed
    exact = gradients(SFTTrainer, SFTConfig, **options)
    theirs = (gradients(SFTTrainer, SFTConfig, bf16=True, **options) - exact).norm()
    ours = (
        gradients(UnslothTrainer, UnslothTrainingArguments, bf16=True, **options, **BATCHINGS[batching]) - exact
    ).norm()
    assert 0 < theirs < 0.05 * exact.norm()
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4), (1, 8), (3, 3)])
def test_any_split_into_microbatches_gives_the_same_step(tmp_path: Path, size: int, accumulation: int) -> None:
    """Eight texts make one step of SGD at rate 1, which subtracts the gradient of the mean over all targets."""
    options = SGD | {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    with tiny.KeepFloat64():
        trainer = build(UnslothTrainer, arguments(tmp_path, **options), texts=8)
        trainer.train()
    assert len(trainer.losses) == accumulation
    assert_one_step_of_the_mean(trainer, trainer.model.state_dict(), sum(trainer.losses))


def assert_one_step_of_the_mean(trainer: Any, after: dict[str, Tensor], loss: float) -> None:
    """The loss is the mean over all targets of the trainer's texts, and the step has subtracted its gradient.

    A gradient sums the terms of some 100 targets after two layers of sums of 40 terms: fewer than 4000 roundings. One
    target with another weight would change the gradient by 1 in 100.
    """
    with tiny.KeepFloat64():
        batch = trainer.data_collator(list(trainer.train_dataset))
        labels = batch.pop("labels")
        model = tiny.model(dtype=torch.float64)
        expected = textbook(model(**batch, use_cache=False), labels, (labels[:, 1:] != -100).sum())
        expected.backward()
    assert loss == pytest.approx(expected.item(), rel=4000 * 2.0**-53)
    for name, before in model.named_parameters():
        torch.testing.assert_close((before - after[name]).detach(), before.grad, rtol=0, atol=4000 * 2.0**-53)


def test_the_loss_is_not_divided_again_by_the_accumulation_steps(tmp_path: Path) -> None:
    """transformers divides a loss that is not marked as divided: at four microbatches the gradient is a quarter.

    The gradients are as close as in `assert_one_step_of_the_mean`, and so is their norm, which is about 1.
    """
    norms = []
    for size, accumulation, divided in ((8, 1, True), (2, 4, True), (2, 4, False)):
        options = SGD | {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        with tiny.KeepFloat64():
            trainer = build(UnslothTrainer, arguments(tmp_path, **options), texts=8)
            if not divided:
                trainer.loss_is_scaled_for_ga = trainer.model_accepts_loss_kwargs = False
            before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            trainer.train()
        after = trainer.model.state_dict()
        norms.append(torch.cat([(before[name] - after[name]).flatten() for name in after]).norm().item())
    whole, accumulated, divided_again = norms
    assert accumulated == pytest.approx(whole, rel=4000 * 2.0**-53)
    assert divided_again == pytest.approx(whole / 4, rel=4000 * 2.0**-53)


def test_a_batch_without_a_target_has_loss_zero(tmp_path: Path) -> None:
    """Texts have one token: no parameter changes. Hugging Face's own mean over no target is NaN."""
    one = torch.tensor([[5]])
    assert tiny.model()(input_ids=one, labels=one).loss.isnan()
    rows = Dataset.from_dict({"input_ids": [[5], [6]], "labels": [[5], [6]]})
    trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=1, weight_decay=0.0))
    trainer.train_dataset = rows
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.losses == [0.0]
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_an_evaluation_has_the_loss_the_accuracy_and_the_logits(tmp_path: Path) -> None:
    """The loss is the mean over the targets of the batch; `compute_metrics` receives the logits."""
    texts = Dataset.from_dict({"text": tiny.texts(5, seed=1)})
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": float(len(prediction.predictions))}

    with tiny.KeepFloat64():
        args = arguments(tmp_path, per_device_eval_batch_size=5)
        trainer = build(UnslothTrainer, args, eval_dataset=texts, compute_metrics=metrics)
        logged = trainer.evaluate()
        (batch,) = trainer.get_eval_dataloader()
        labels = batch.pop("labels")
        model = tiny.model(dtype=torch.float64)
        outputs = model(**batch, use_cache=False)
        targets = labels[:, 1:]
        expected = textbook(outputs, labels, (targets != -100).sum())
    accuracy = (outputs.logits[:, :-1].argmax(-1) == targets)[targets != -100].double().mean()
    assert trainer.losses == [pytest.approx(expected.item(), rel=1e-13)]
    assert logged["eval_loss"] == pytest.approx(expected.item(), rel=1e-13)
    assert trainer.state.log_history[-1]["eval_mean_token_accuracy"] == pytest.approx(accuracy.item())
    assert logged["eval_rows"] == 5
    torch.testing.assert_close(
        torch.as_tensor(seen[0].predictions), outputs.logits.detach().to(torch.as_tensor(seen[0].predictions).dtype)
    )


@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_the_log_counts_tokens(tmp_path: Path, batching: str, multiple: int | None) -> None:
    """It counts all four microbatches of a step, without padding. It has no accuracy, which needs the logits."""
    options = {"gradient_accumulation_steps": 4, "max_steps": 1, "pad_to_multiple_of": multiple, "max_length": 42}
    options |= BATCHINGS[batching] | {"per_device_train_batch_size": 1 if batching == "packed" else 2}
    trainer = build(UnslothTrainer, arguments(tmp_path, **options), texts=8)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["num_tokens"] == sum(map(len, trainer.train_dataset["input_ids"]))
    assert "mean_token_accuracy" not in log


def test_a_resumed_run_continues_with_the_same_bits(tmp_path: Path) -> None:
    """The last three of six steps have the same losses if a run resumes from the checkpoint of the third."""
    options = {"embedding_learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 3}
    whole = build(UnslothTrainer, arguments(tmp_path, **options), lora=True)
    whole.train()
    resumed = build(UnslothTrainer, arguments(tmp_path, **options), lora=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.losses == whole.losses[3:]


def test_a_saved_model_is_a_hugging_face_model(tmp_path: Path) -> None:
    """transformers loads it, and its logits are those of the trained model."""
    trainer = build(UnslothTrainer, arguments(tmp_path), torch.float32)
    trainer.train()
    trainer.save_model()
    loaded = type(tiny.model()).from_pretrained(tmp_path)
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"compute_loss_func": textbook}], ids=["dft", "function"])
def test_trl_computes_any_other_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]) -> None:
    """TRL scales it under gradient accumulation; the log gives the reason."""
    function = {name: value for name, value in options.items() if name == "compute_loss_func"}
    options = {name: value for name, value in options.items() if name not in function}
    options |= {"max_steps": 2, "gradient_accumulation_steps": 2, "padding_free": False}
    with tiny.KeepFloat64():
        ours = build(UnslothTrainer, arguments(tmp_path, **options), **function)
        ours.train()
        theirs = build(SFTTrainer, arguments(tmp_path, SFTConfig, **options), **function)
        theirs.train()
    assert ours.losses == theirs.losses
    assert [log.get("grad_norm") for log in ours.state.log_history] == [
        log.get("grad_norm") for log in theirs.state.log_history
    ]
    assert "loss: TRL's own, not the backend's" in caplog.text


def test_an_adapter_on_the_head_needs_the_backends_loss(tmp_path: Path) -> None:
    """TRL's loss would not train it, so the trainer refuses that combination."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"^target_modules: got an adapter on the output head"):
        build(UnslothTrainer, arguments(tmp_path, loss_type="dft"), model=get_peft_model(tiny.model(), config))


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments], ids=lambda kind: kind.__name__)
def test_plain_arguments_take_the_backend_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """Such arguments have no field for a backend."""
    monkeypatch.setenv("UNSLOTH_BACKEND", "reference,swiglu=reference")
    trainer = build(UnslothTrainer, arguments(tmp_path, kind, max_steps=1))
    assert trainer.backend.name == "reference,swiglu=reference"
    trainer.train()
    assert "embedding_learning_rate" not in trainer.state.log_history[0]


def test_a_trainer_is_freed_with_its_last_reference_and_keeps_no_raw_data(tmp_path: Path) -> None:
    """A reference cycle would hold the model's memory on the GPU until Python's collector runs."""
    documents = Dataset.from_dict({"text": ["a b c", "b c"]})
    raw = weakref.ref(documents)
    trainer = UnslothTrainer(
        tiny.model(), arguments(tmp_path), train_dataset=documents, processing_class=tiny.tokenizer()
    )
    freed = weakref.ref(trainer)
    del documents
    gc.collect()
    assert raw() is None
    gc.disable()
    try:
        del trainer
        assert freed() is None
    finally:
        gc.enable()

"""Losses, methods and collators of the user's own see the batches and the numbers of plain TRL."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.trainer.runs import SGD, arguments, build, textbook
from unsloth_fast import UnslothTrainer

# TRL warns of deprecated options.
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = {"train_dataset": Dataset.from_dict({"text": tiny.texts(8)}), "processing_class": tiny.tokenizer()}


def mean_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of the rows' mean losses: it depends on which documents share a row."""
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    targets = (labels[:, 1:] != -100).sum(1)
    return (losses.sum(1) / targets.clamp(min=1)).mean()


def with_own_loss(kind: Any) -> Any:
    """A trainer's class with a loss of its own that reads the mask and leaves the positions to the model."""

    class OwnLoss(kind):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            loss = mean_of_rows(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    return OwnLoss


def func_of_rows(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The same as a `compute_loss_func`."""
    return mean_of_rows(outputs.logits, labels)


@pytest.mark.parametrize("how", ["method", "function"])
def test_a_loss_of_ones_own_has_the_numbers_of_plain_trl(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are padded as in TRL, without a choice of padding_free; float32 in sums of some 40 terms over two layers."""
    losses = []
    for kind, config in ((UnslothTrainer, {}), (SFTTrainer, {"kind": SFTConfig})):
        more: dict[str, Any] = {"compute_loss_func": func_of_rows} if how == "function" else {}
        kind = with_own_loss(kind) if how == "method" else kind
        trainer = build(kind, arguments(tmp_path, **config), torch.float32, **more)
        trainer.train()
        losses.append(trainer.losses)
    assert losses[0] == pytest.approx(losses[1], rel=4000 * 2.0**-24)
    reason = "OwnLoss.compute_loss is your own" if how == "method" else "compute_loss_func is your own"
    assert f"batching: padded, because {reason}; padding_free=True concatenates the documents" in caplog.messages


def test_a_term_of_the_logits_is_trained_on(tmp_path: Path) -> None:
    """The outputs that `compute_loss` returns have the gradient of the model's."""

    class FromTrainer(UnslothTrainer):
        def compute_loss(self, *positional: Any, **keywords: Any) -> Any:
            loss, outputs = super().compute_loss(*positional, **keywords | {"return_outputs": True})
            return loss + outputs.logits.square().mean()

    class FromModel(UnslothTrainer):
        def compute_loss(self, model: Any, inputs: Any, *positional: Any, **keywords: Any) -> Any:
            outputs = model(**inputs)
            logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
            return cross_entropy(logits, labels) + outputs.logits.square().mean()

    weights = []
    for kind in (FromTrainer, FromModel):
        trainer = build(kind, arguments(tmp_path, **SGD, padding_free=False))
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)


class Delegating(UnslothTrainer):
    """Calls the trainer's own methods."""

    def compute_loss(self, *positional: Any, **keywords: Any) -> Any:
        """Twice the loss."""
        return 2 * super().compute_loss(*positional, **keywords)

    def training_step(self, *positional: Any, **keywords: Any) -> Any:
        """The same step."""
        return super().training_step(*positional, **keywords)


class OwnPrediction(Delegating):
    """Its evaluation reads the batches."""

    def prediction_step(self, model: Any, inputs: Any, *positional: Any, **keywords: Any) -> Any:
        """No loss."""
        return None, None, None


@pytest.mark.parametrize(
    ("kind", "options", "data", "padding_free"),
    [
        (UnslothTrainer, {}, {}, True),
        (Delegating, {}, {}, True),
        (OwnPrediction, {}, {}, False),
        (with_own_loss(UnslothTrainer), {}, {}, False),
        (with_own_loss(UnslothTrainer), {"padding_free": True}, {}, True),
        (with_own_loss(UnslothTrainer), {"packing": True}, {}, True),
        (with_own_loss(UnslothTrainer), {}, {"input_ids": [[3, 4, 5]], "seq_lengths": [[1, 2]]}, True),
    ],
    ids=["ours", "delegating", "prediction", "loss", "asked for", "packing", "packed rows"],
)
def test_only_code_that_takes_batches_itself_gets_padded_ones(
    tmp_path: Path, kind: Any, options: dict[str, Any], data: dict[str, Any], padding_free: bool
) -> None:
    """What was asked for is kept, and so are rows that are packed."""
    given = TEXTS | ({"train_dataset": Dataset.from_dict(data)} if data else {})
    trainer = kind(model=tiny.model(), args=arguments(tmp_path, **options), **given)
    assert trainer.padding_free is padding_free


def test_a_collator_of_ones_own_is_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It makes the batches itself, whatever the loss."""
    UnslothTrainer(
        model=tiny.model(),
        args=arguments(tmp_path),
        data_collator=lambda examples: examples,
        compute_loss_func=textbook,
        **TEXTS,
    )
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert not any(message.startswith("batching: padded") for message in warnings)


def trained(folder: Path, collator: Any) -> Any:
    """A trainer that took one step on batches of a collator."""
    trainer = UnslothTrainer(
        model=tiny.model(dtype=torch.float64), args=arguments(folder, max_steps=1), data_collator=collator, **TEXTS
    )
    with tiny.KeepFloat64():
        trainer.train()
    return trainer


TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": TOKENS}, 8),
        ({"input_ids": TOKENS, "use_cache": False}, 8),
        ({"inputs_embeds": tiny.model(dtype=torch.float64).get_input_embeddings()(TOKENS).detach()}, 8),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(2, 4, dtype=torch.int64).tril(1)}, 5),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()}, 8),
    ],
    ids=["tokens", "use_cache", "embeddings", "mask", "mask of pairs"],
)
def test_batches_of_a_collator_may_have_what_the_model_takes(
    tmp_path: Path, batch: dict[str, Any], tokens: int
) -> None:
    """The loss is that of the model on the batch; tokens are those of a mask [B, S], else all."""
    with tiny.KeepFloat64():
        outputs = tiny.model(dtype=torch.float64)(**batch)
        expected = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item()
    log = trained(tmp_path, lambda _: batch | {"labels": TOKENS}).state.log_history[0]
    assert log["loss"] == pytest.approx(expected, rel=2.0**-20)  # logged in float32
    assert log["num_tokens"] == tokens


@pytest.mark.parametrize(
    ("labels", "got"),
    [({}, "the keys 'input_ids'"), ({"labels": None}, "the keys 'input_ids', 'labels'")],
    ids=["missing", "None"],
)
def test_a_batch_without_labels_is_refused(tmp_path: Path, labels: dict[str, Any], got: str) -> None:
    with pytest.raises(ValueError, match=f"^data_collator: got a batch without a tensor of labels .*{got}"):
        trained(tmp_path, lambda _: {"input_ids": TOKENS} | labels)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"input_ids": TOKENS.tolist(), "labels": TOKENS.tolist()}, "'input_ids' (list), 'labels' (list)"),
        ({"input_ids": TOKENS.numpy(), "labels": TOKENS}, "'input_ids' (ndarray)"),
        ({"input_ids": TOKENS, "attention_mask": [[1] * 4] * 2, "labels": TOKENS}, "'attention_mask' (list)"),
        ((TOKENS, TOKENS), "a batch of type tuple"),
    ],
    ids=["lists", "array", "mask", "tuple"],
)
def test_a_batch_of_other_things_than_tensors_is_refused(tmp_path: Path, batch: Any, got: str) -> None:
    """The message names the keys and the types."""
    with pytest.raises(ValueError, match=f"^data_collator: got {re.escape(got)}.*; allowed: "):
        trained(tmp_path, lambda _: batch)


def test_a_loss_of_ones_own_may_take_any_batch(tmp_path: Path) -> None:
    """Lists that the method makes tensors of are allowed."""

    class Own(UnslothTrainer):
        def compute_loss(self, model: Any, inputs: Any, *positional: Any, **keywords: Any) -> Tensor:
            return model(input_ids=inputs["input_ids"], labels=torch.tensor(inputs["labels"])).loss

    batch = {"input_ids": TOKENS, "labels": TOKENS.tolist(), "attention_mask": [[1] * 4] * 2}
    args = arguments(tmp_path, max_steps=1)
    log = Own(model=tiny.model(), args=args, data_collator=lambda _: batch, **TEXTS).train()
    assert log.training_loss > 0


def half_logits(how: str) -> Any:
    """A model whose logits are halved by a forward that is set on it, or by a hook of its head; or GPT-2."""
    if how == "class":  # transformers counts targets only of classes that are called ...ForCausalLM
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": len(tiny.WORDS), "n_embd": 32, "n_layer": 1, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).double()
    model = tiny.model(dtype=torch.float64)
    if how == "hook":
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
        return model
    forward = model.forward

    def halved(*positional: Any, **keywords: Any) -> Any:
        outputs = forward(*positional, **keywords)
        outputs.logits = outputs.logits * 0.5
        return outputs

    model.forward = halved
    return model


@pytest.mark.parametrize("how", ["forward", "hook", "class"])
def test_the_loss_is_the_mean_over_the_targets_of_the_users_model(tmp_path: Path, how: str) -> None:
    """TRL's fused head leaves out the forward and the hook, and divides GPT-2's loss by all labels."""
    with tiny.KeepFloat64():
        args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=8, padding_free=False)
        trainer = build(UnslothTrainer, args, model=half_logits(how), texts=8)
        batch = trainer.data_collator(list(trainer.train_dataset))
        labels = batch.pop("labels")
        expected = textbook(half_logits(how)(**batch), labels, (labels[:, 1:] != -100).sum()).item()
        trainer.train()
    assert trainer.losses == [pytest.approx(expected, rel=4000 * 2.0**-53)]


@pytest.mark.parametrize("last", ["training", "evaluation"])
def test_the_summary_of_a_run_is_no_evaluation(tmp_path: Path, last: str) -> None:
    """Its names are those of plain TRL, and `num_tokens`, which TRL repeats there for steps that no entry has."""
    names = []
    for kind, config in ((UnslothTrainer, {}), (SFTTrainer, {"kind": SFTConfig})):
        evaluation = {"eval_strategy": "steps", "eval_steps": 2} if last == "evaluation" else {}
        args = arguments(tmp_path, max_steps=2, **config, **evaluation)
        trainer = kind(model=tiny.model(), args=args, eval_dataset=TEXTS["train_dataset"], **TEXTS)
        trainer.train()
        names.append(set(trainer.state.log_history[-1]))
        if kind is UnslothTrainer:
            assert trainer.state.num_input_tokens_seen > 0
    assert names[0] == names[1] | ({"num_tokens"} if last == "training" else set())

"""A model whose forward computes another loss than the cross entropy of its logits is named in a warning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests import tiny
from tests.trainer.runs import arguments, build
from unsloth_fast import UnslothTrainer
from unsloth_fast.models.own_loss import warn_of_own_loss


class Own(LlamaForCausalLM):
    """The cross entropy, in the dtype of the logits."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        outputs: Any = super().forward(input_ids, **kwargs)  # pyright: ignore[reportArgumentType]
        outputs.loss = None if labels is None else self.changed(outputs.logits, labels)
        return outputs

    def changed(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Wide(Own):
    def changed(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        return super().changed(logits.float(), labels)


class Absent(Own):
    def changed(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Its users compute the loss."""
        return None


class Raising(Own):
    def changed(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        raise ValueError("labels")


class Penalised(Own):
    def changed(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """A little, and in training alone."""
        loss = super().changed(logits.float(), labels)
        assert loss is not None
        return loss + 1e-3 * logits.float().logsumexp(-1).square().mean() * self.training


class Unshifted(Own):
    def changed(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        return cross_entropy(logits.flatten(0, 1), labels.flatten())


def made(kind: type[Own], dtype: torch.dtype) -> Own:
    model: Any = tiny.model(dtype=dtype)
    model.__class__ = kind
    with torch.no_grad():
        model.lm_head.weight *= 100  # any loss of even logits is nearly the same
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Own, Wide, Absent, Raising, Penalised, Unshifted])
def test_another_loss_is_named(kind: type[Own], dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Both numbers are in the warning; a loss in 16 bits is the same up to its rounding; the mode stays."""
    model = made(kind, dtype)
    warn_of_own_loss(model)
    assert not model.training
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (kind in (Penalised, Unshifted))
    assert all(f"the {kind.__name__} computes a loss of its own, " in warning for warning in warnings)


def test_the_trainer_warns_and_minimises_the_cross_entropy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The losses are those of the model without the penalty."""
    losses = []
    for kind in (Own, Penalised):
        trainer = build(UnslothTrainer, arguments(tmp_path, max_steps=1), model=made(kind, torch.float64))
        trainer.train()
        losses.append(trainer.losses)
    assert losses[0] == losses[1]
    assert caplog.text.count("the cross entropy is minimised") == 1

"""The load-balancing loss of a mixture of experts beside the loss of its tokens, weighted and logged as TRL does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.load_balancing import has_usual_load_balancing


def weighs_load_balancing(trainer: Any) -> bool:
    """Whether `LoadBalancing` adds what TRL would: older releases leave the weight to the model."""
    return hasattr(trainer, "router_aux_loss_coef") and has_usual_load_balancing(without_adapter(trainer.model))


class LoadBalancing:
    """The load-balancing losses of microbatches since they were last logged, in training and in evaluations."""

    def __init__(self) -> None:
        self._totals: dict[bool, Tensor] = {}

    def added(
        self, loss: Tensor, load_balancing: Tensor | None, num_items: Tensor | int | None, trainer: Any
    ) -> Tensor:
        """The loss of a microbatch and its weighted load-balancing loss.

        That is a mean over tokens, which no count of targets divides: the microbatches of a step have equal shares.

        Args:
            loss: of the tokens, 0-dim.
            load_balancing: the load-balancing loss, 0-dim; None where there is none.
            num_items: the count that divided the loss; None outside of training, where a microbatch is a whole.
            trainer: a `trl.SFTTrainer`, which has the weight.
        """
        if load_balancing is None:
            return loss
        kept = load_balancing.detach().double().mean()  # torch.nn.DataParallel returns one per GPU
        total, training = torch.stack([kept, torch.ones_like(kept)]), trainer.model.training
        self._totals[training] = total + self._totals.get(training, 0.0)
        steps = 1 if num_items is None else trainer.current_gradient_accumulation_steps
        return loss + trainer.router_aux_loss_coef * load_balancing / steps

    def take(self, training: bool, sum_over_devices: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """The mean of the losses by TRL's name since this was last called; empty if there were none.

        Args:
            training: whether those of training are wanted, or those of evaluations.
            sum_over_devices: adds up a tensor over all data-parallel processes.
        """
        total = self._totals.pop(training, None)
        if total is None:
            return {}
        summed, count = sum_over_devices(total).tolist()
        return {"aux_loss": [summed / count]}

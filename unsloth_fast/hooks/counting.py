"""Counting: the targets that divide the loss, and the tokens that the log reports.

All counts stay on the device until they are logged: reading one back waits for the device.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from unsloth_fast.data.collator import EXAMPLE_ENDS

logger = logging.getLogger(__name__)


class Counter:
    """Counts of a run.

    Args:
        device: where the counts are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._first_step = True
        self._state: TrainerState | None = None
        self._total = 0

    def step(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        count_targets: Callable[[Iterable[Tensor]], Tensor],
        sum_over_devices: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Count one step of the optimizer.

        Args:
            batches: the microbatches of this process, each with labels [B, S] and, where rows are padded, an
                attention_mask [B, S]; a mask of another shape, such as one of pairs of tokens, counts nothing. Where
                one row is padded, it has the ends of its examples.
            count_targets: the training piece of that name.
            sum_over_devices: adds up a tensor of counts over all data-parallel processes.

        Returns:
            The targets of all processes and those of this one, 0-dim int64 on the counter's device.
        """
        tokens = torch.stack([_tokens(batch) for batch in batches]).sum()
        targets = count_targets(batch["labels"] for batch in batches)
        own = torch.stack([targets.to(self._tokens.device), tokens.to(self._tokens.device)])
        total = sum_over_devices(own)
        self._tokens += total[1]
        if self._first_step:  # only here: reading the number waits for the device
            self._first_step = False
            if not total[0]:
                logger.warning(
                    "the first step's batches have no target: their loss is 0 and trains nothing; check labels, "
                    "completion_mask and assistant_masks, and what the data collator does to them"
                )
        return total[0], own[0]

    def take_tokens(self) -> int:
        """The tokens of all processes since this was last asked for."""
        tokens = int(self._tokens)
        self._tokens.zero_()
        return tokens

    def continued(self, state: TrainerState, tokens: int) -> int:
        """These tokens and all before them under the same state, from the last number in its log on."""
        if self._state is not state:  # of another training, or loaded from a checkpoint
            logged = (entry.get("num_tokens", entry.get("eval_num_tokens", 0)) for entry in state.log_history)
            self._state, self._total = state, int(max(logged, default=0))
        self._total += tokens
        return self._total


def _tokens(batch: Mapping[str, Tensor]) -> Tensor:
    labels, mask, ends = batch["labels"], batch.get("attention_mask"), batch.get(EXAMPLE_ENDS)
    if ends is not None:
        return ends[-1]
    return (mask if isinstance(mask, Tensor) and mask.shape == labels.shape else torch.ones_like(labels)).sum()


def scaled_by_devices(loss: Tensor, num_items: Tensor | int | None, trainer: Any) -> Tensor:
    """The loss times the number of data-parallel processes where a count of all of them divided it.

    Data parallelism averages the gradients over the processes, which would divide the loss once more.

    Args:
        loss: of a microbatch, 0-dim.
        num_items: the count that divided it; None if its own targets did.
        trainer: whose arguments say whether targets are counted over all processes.
    """
    if num_items is None or not trainer.args.average_tokens_across_devices:
        return loss
    return loss * (trainer.accelerator.num_processes // trainer.get_tp_size())


def logged_tokens(state: TrainerState, counter: Counter, counted_by_transformers: str) -> int:
    """The tokens without padding since training began, resumed runs included: the trainer's state keeps them.

    A checkpoint holds the state. Where transformers counts the padding too, they continue the last number in its log.

    Args:
        state: `transformers.TrainerState`.
        counter: of the run.
        counted_by_transformers: include_num_input_tokens_seen, what transformers adds to the state: "no", "non_padding"
            or "all".
    """
    tokens = counter.take_tokens()
    if counted_by_transformers == "all":
        return counter.continued(state, tokens)
    if counted_by_transformers == "no":
        state.num_input_tokens_seen += tokens
    return state.num_input_tokens_seen

"""The trainer's evaluations: the mean over all targets of a data set, whatever its batches and its processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from unsloth_fast import batches
from unsloth_fast.backends import Backend
from unsloth_fast.packed_dataset import has_lists


class EvaluatingTrainer(SFTTrainer):
    """`trl.SFTTrainer` with exact losses of evaluations and predictions; what it reads is made by `UnslothTrainer`.

    transformers averages the means of batches, which moves with their size, their padding and the processes.
    """

    # transformers types these as unions that include what they are before and outside of training.
    model: Any
    args: Any
    data_collator: Any
    eval_dataset: Any
    optimizer: Any
    accelerator: Any

    backend: Backend
    _own_loss: bool  # whether the loss is the backend's
    _padding_collator: Any
    _right: Tensor  # [2] int64: predictions that were right, of how many targets, since the last log
    _evaluated: list[tuple[Tensor, Tensor]]  # of each batch the mean loss, and its targets

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of an evaluation; with `compute_metrics`, which takes rows, a row a document."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        chosen = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        with self._evaluating(chosen, row_a_document=self.compute_metrics is not None):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The batches of `predict`, a row a document, as its result has it."""
        with self._evaluating(test_dataset, row_a_document=True):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluating(self, dataset: Any, row_a_document: bool) -> Iterator[None]:
        """Collate with padding where rows are asked for that are not packed already, else say where examples end."""
        usual = self.data_collator
        if isinstance(usual, batches.PackedCollator):
            padded = row_a_document and not has_lists(dataset, "seq_lengths")
            self.data_collator = self._padding_collator if padded else replace(usual, say_ends=True)
        try:
            yield
        finally:
            self.data_collator = usual

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """transformers' loop; the loss is the mean over all targets, not over the batches' means."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = self._evaluated_loss()
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of one batch of an evaluation, and its logits and labels unless the loss alone is asked for."""
        inputs = dict(inputs)
        ends = inputs.pop(batches.EXAMPLE_ENDS, None)
        if not self._own_loss or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            # accelerate repeats documents until the last batch of every process is full.
            size = len(labels) if ends is None else len(ends)
            new = state.remainder - self.accelerator.process_index // self.get_tp_size() * size
            inputs["labels"] = batches.without_repeated(labels, ends, new)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self.compute_loss(model, inputs, return_outputs=not prediction_loss_only)
        loss, logits = (found, None) if prediction_loss_only else (found[0], found[1].logits)
        targets = self.backend.training.count_targets([inputs["labels"]])
        self._evaluated.append((loss, targets))
        return loss, logits, None if prediction_loss_only else labels

    def _evaluated_loss(self) -> float:
        """The mean over the targets of all batches on all devices; without those whose loss is not finite, if asked."""
        losses, targets = (torch.stack(column).cpu().double() for column in zip(*self._evaluated, strict=True))
        kept = losses.isfinite() | (not self.args.logging_nan_inf_filter)
        sums = losses * targets
        totals = torch.stack([sums[kept].sum(), targets[kept].sum(), sums.sum()])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals.to(self.args.device), "sum")
        total, count, everything = totals.tolist()
        return total / count if count else everything  # 0, or what is not finite

    @torch.no_grad()
    def _count_right(self, logits: Tensor, labels: Tensor) -> None:
        """Add up on the device what `log` reports: reading numbers back in each microbatch would wait for it."""
        targets = labels[:, 1:]
        valid = targets != -100
        correct = (logits[:, :-1].argmax(-1) == targets) & valid
        counts = torch.stack([correct.sum(), valid.sum()]).to(self.args.device)
        self._right += self.accelerator.reduce(counts, "sum") // self.get_tp_size()

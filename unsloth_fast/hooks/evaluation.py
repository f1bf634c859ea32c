"""The metrics of an evaluation: means over all targets of a data set, whatever its batches and its processes.

transformers and TRL average the means of batches, which depend on their size, their padding and the number of
processes.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from unsloth_fast.config import UnslothTrainingArguments
from unsloth_fast.data.collator import PackedCollator, without_repeated
from unsloth_fast.data.tokens import has_packed_rows, refuse_packed_rows

_TRL_WARNS = tuple(map(int, trl.__version__.split(".")[:2])) >= (1, 16)
SCORES = ("mean_token_accuracy", "entropy")  # TRL's names
# transformers' further metrics; the last are starts of names.
_OF_THE_LOOP = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_", "mem_")


class Scores:
    """The accuracy and the entropy of predictions, over all their targets."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, scores: Tensor | None) -> None:
        """Add what `models.scores.score` returned for a batch; None if it was not asked."""
        if scores is not None:
            self._total = scores if self._total is None else self._total + scores

    def take(self, sum_over_devices: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The scores by TRL's names since this was last called; empty if none were added, 0 without a target.

        Args:
            sum_over_devices: adds up a tensor over all data-parallel processes.
        """
        total, self._total = self._total, None
        if total is None:
            return {}
        right, entropy, targets = sum_over_devices(total).tolist()
        return dict(zip(SCORES, (right / max(targets, 1), entropy / max(targets, 1)), strict=True))


class Evaluated:
    """The losses of the batches of one evaluation, weighted by their targets, and the scores where they are counted.

    Args:
        finite_only: whether to leave out batches whose loss is not finite, unless there are no others.
    """

    def __init__(self, *, finite_only: bool = True) -> None:
        self._finite_only = finite_only
        self._batches: list[tuple[Tensor, Tensor]] = []
        self.scores = Scores()

    def add(self, loss: Tensor, targets: Tensor) -> None:
        """Add a batch: its mean loss and how many targets it has, both 0-dim."""
        self._batches.append((loss, targets))

    def mean(self, sum_over_devices: Callable[[Tensor], Tensor]) -> float | None:
        """The mean loss over the targets of all batches on all devices.

        Args:
            sum_over_devices: adds up a tensor over all data-parallel processes.

        Returns:
            None if no batch was added.
        """
        if not self._batches:
            return None
        losses, targets = (torch.stack(column).cpu().double() for column in zip(*self._batches, strict=True))
        kept = losses.isfinite() | (not self._finite_only)
        sums = losses * targets
        totals = torch.stack([sums[kept].sum(), targets[kept].sum(), sums.sum()])
        total, count, everything = sum_over_devices(totals).tolist()
        return total / count if count else everything  # 0, or what is not finite

    def write_to(
        self, metrics: dict[str, float] | None, prefix: str, sum_over_devices: Callable[[Tensor], Tensor]
    ) -> None:
        """Write the loss and the scores into the metrics of transformers' loop. Those of a user's function stay.

        Args:
            metrics: of the evaluation, which are changed; None if the loop made none.
            prefix: of their names: "eval", or "eval_NAME" for one of several data sets. The scores are then also under
                "eval", as TRL logs them.
            sum_over_devices: as in `mean`.
        """
        metrics = {} if metrics is None else metrics
        loss = self.mean(sum_over_devices)
        if loss is not None:
            metrics[f"{prefix}_loss"] = loss
        scores = self.scores.take(sum_over_devices)
        for start in {prefix, prefix.split("_")[0]} if prefix.startswith("eval_") else {prefix}:
            for name, value in scores.items():
                metrics.setdefault(f"{start}_{name}", value)


def warn_of_logits(args: object, *, asked: bool) -> None:
    """Repeat TRL's warning to a script for plain TRL, which asked for logits: it will soon not get them there."""
    if asked and not isinstance(args, UnslothTrainingArguments) and _TRL_WARNS:
        warnings.warn(
            "`return_outputs=True`: trl.SFTTrainer will not pass logits to `compute_metrics` and "
            "`preprocess_logits_for_metrics` from TRL 2.0 on; UnslothTrainer does",
            FutureWarning,
            stacklevel=3,
        )


def wants_scores(trainer: Any, with_outputs: bool) -> bool:
    """Whether a batch is scored: where its logits are computed anyway, and where the best model is chosen by a score.

    Args:
        trainer: an `UnslothTrainer`; the metric that chooses the best model is one of its evaluations.
        with_outputs: whether the logits are computed.
    """
    metric = trainer.args.metric_for_best_model
    return with_outputs or (not trainer.model.training and metric is not None and metric.endswith(SCORES))


def check_best_metric(trainer: Any) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will have, where no code of the user's can add one.

    Args:
        trainer: an `UnslothTrainer` whose loss is the backend's, before it trains.

    Raises:
        ValueError: there is no such metric; transformers would only report it after the first evaluation.
    """
    asked, data = trainer.args.metric_for_best_model, trainer.eval_dataset
    callbacks = (type(callback).__module__.split(".")[0] for callback in trainer.callback_handler.callbacks)
    if (
        asked is None
        or trainer.args.eval_strategy == "no"
        or trainer.compute_metrics is not None
        or not {"transformers", "trl", "unsloth_fast"}.issuperset(callbacks)
    ):
        return
    prefixes = [f"{name}_" for name in data] if isinstance(data, dict) else [""]
    usual = [f"{prefix}{name}" for prefix in prefixes for name in ("loss", *SCORES)]
    usual += [name for name in (*SCORES, "num_tokens") if name not in usual]
    others = tuple(f"{prefix}{name}" for prefix in prefixes for name in _OF_THE_LOOP)
    name = asked.removeprefix("eval_")
    if name not in usual and not name.startswith(others):
        raise ValueError(
            f"metric_for_best_model: got {asked!r}; allowed: {', '.join(usual)}, or a metric of compute_metrics"
        )


def collator_for(dataset: object, usual: Any, padding: Any, *, row_per_document: bool) -> Any:
    """The collator of an evaluation.

    Args:
        dataset: which is evaluated.
        usual: the collator of training.
        padding: TRL's, which pads.
        row_per_document: whether the results are wanted in one row per document.

    Returns:
        The user's own collator; the padding one where rows are wanted of documents that are not packed; else the usual
        one, with the ends of examples in its batches.

    Raises:
        ValueError: packed rows for TRL's collator, which pads.
    """
    if type(usual) is DataCollatorForLanguageModeling:
        refuse_packed_rows(dataset, "eval_dataset", "the trainer was built with them")
    if not isinstance(usual, PackedCollator):
        return usual
    if row_per_document and not has_packed_rows(dataset):
        return padding
    return replace(usual, with_ends=True)


def labels_counted_once(labels: Tensor, ends: Tensor | None, accelerator: Any, tp_size: int) -> Tensor:
    """The labels of a batch; the targets of documents that another batch has already are taken out.

    accelerate repeats documents until the last batch of every process is full.

    Args:
        labels: [B, S].
        ends: [examples] int64, where each example ends if all are in one row; None for one row per example.
        accelerator: `accelerate.Accelerator`, which knows how many documents of the last batches are new.
        tp_size: how many processes share a batch in tensor parallelism.
    """
    state, rank = accelerator.gradient_state, accelerator.process_index // tp_size
    if not state.end_of_dataloader or state.remainder <= 0:
        return labels
    size = len(labels) if ends is None else len(ends)
    return without_repeated(labels, ends, state.remainder - rank * size)


def prediction_of(found: Any, labels: Tensor, *, loss_only: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, logits and labels of a batch, as transformers' loop takes them.

    Args:
        found: what `compute_loss` returned: the loss, or without loss_only the pair of the loss and the outputs.
        labels: [B, S], those of repeated documents included: the loop leaves repeated rows out itself.
        loss_only: whether only the loss is wanted; the others are None.
    """
    if loss_only:
        return found, None, None
    loss, outputs = found
    return loss, outputs.logits, labels

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

    def add(self, scores: Tensor) -> None:
        """Add what `models.scores.score` returned for a batch."""
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
    """The losses of the batches of one evaluation, weighted by their targets, and the scores where they are counted."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] = []
        self.scores = Scores()

    def add(self, loss: Tensor, targets: Tensor) -> None:
        """Add a batch: its mean loss and how many targets it has, both 0-dim."""
        self._batches.append((loss, targets))

    def mean(self, sum_over_devices: Callable[[Tensor], Tensor], *, finite_only: bool) -> float | None:
        """The mean loss over the targets of all batches on all devices.

        Args:
            sum_over_devices: adds up a tensor over all data-parallel processes.
            finite_only: whether to leave out batches whose loss is not finite, unless there are no others.

        Returns:
            None if no batch was added.
        """
        if not self._batches:
            return None
        losses, targets = (torch.stack(column).cpu().double() for column in zip(*self._batches, strict=True))
        kept = losses.isfinite() | (not finite_only)
        sums = losses * targets
        totals = torch.stack([sums[kept].sum(), targets[kept].sum(), sums.sum()])
        total, count, everything = sum_over_devices(totals).tolist()
        return total / count if count else everything  # 0, or what is not finite

    def write_to(
        self,
        metrics: dict[str, float],
        prefix: str,
        sum_over_devices: Callable[[Tensor], Tensor],
        *,
        finite_only: bool,
    ) -> None:
        """Write the loss and the scores into the metrics of transformers' loop. Those of a user's function stay.

        Args:
            metrics: of the evaluation, which are changed.
            prefix: of their names: "eval", or "eval_NAME" for one of several data sets. The scores are then also under
                "eval", as TRL logs them.
            sum_over_devices: as in `mean`.
            finite_only: as in `mean`.
        """
        loss = self.mean(sum_over_devices, finite_only=finite_only)
        if loss is not None:
            metrics[f"{prefix}_loss"] = loss
        scores = self.scores.take(sum_over_devices)
        for start in {prefix, prefix.split("_")[0]} if prefix.startswith("eval_") else {prefix}:
            for name, value in scores.items():
                metrics.setdefault(f"{start}_{name}", value)


def warn_of_logits(args: object) -> None:
    """Repeat TRL's warning to a script for plain TRL that it will not get logits there for much longer."""
    if not isinstance(args, UnslothTrainingArguments) and _TRL_WARNS:
        warnings.warn(
            "`return_outputs=True`: trl.SFTTrainer will not pass logits to `compute_metrics` and "
            "`preprocess_logits_for_metrics` from TRL 2.0 on; UnslothTrainer does",
            FutureWarning,
            stacklevel=3,
        )


def asks_for_scores(metric: str | None) -> bool:
    """Whether the metric that chooses the best model, or stops training early, is one of the `SCORES`."""
    return metric is not None and metric.endswith(SCORES)


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


def labels_counted_once(labels: Tensor, ends: Tensor | None, gradient_state: Any, rank: int) -> Tensor:
    """The labels of a batch; the targets of documents that another batch has already are taken out.

    accelerate repeats documents until the last batch of every process is full.

    Args:
        labels: [B, S].
        ends: [examples] int64, where each example ends if all are in one row; None for one row per example.
        gradient_state: `accelerate.state.GradientState`.
        rank: of this process among the data-parallel ones.
    """
    if not gradient_state.end_of_dataloader or gradient_state.remainder <= 0:
        return labels
    size = len(labels) if ends is None else len(ends)
    return without_repeated(labels, ends, gradient_state.remainder - rank * size)

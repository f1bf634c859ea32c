"""Collation: the documents of a batch in one row, as the model's keyword arguments."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from unsloth_fast.data.labels import labels_of
from unsloth_fast.seams import overrides
from unsloth_ref.types import IGNORE_INDEX, PackedBatch

EXAMPLE_ENDS = "example_ends"  # the key, in batches that no model has seen yet, of where each example ends in the row
COLUMNS = ("input_ids", "attention_mask", "position_ids", "labels")  # of a batch; each one tensor
_ALLOWED = f"allowed: a dictionary with 'labels' [B, S], {IGNORE_INDEX} at tokens that are no targets"


@dataclass
class PackedCollator(DataCollatorForLanguageModeling):
    """All documents of the examples in one row, by the backend's `collate`. A subclass of the one TRL checks for.

    Args:
        collate: the backend's training piece of that name.
        vocab_size: tokens and labels must be below it.
        completion_only: whether a completion_mask counts, where the examples have no labels yet.
        with_ends: whether the batch also holds where each example ends; no model takes that. In training it tells
            tokens from the padding at the end of the row.
    """

    collate: Callable[..., PackedBatch] | None = None
    vocab_size: int | None = None
    completion_only: bool = False
    with_ends: bool = False

    @overrides(DataCollatorForLanguageModeling)
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as the model's keyword arguments."""
        assert self.collate is not None
        batch = self.collate(
            [example | labels_of(example, self.completion_only) for example in examples],
            pad_to_multiple_of=self.pad_to_multiple_of,
            pad_token_id=self.pad_token_id,
            vocab_size=self.vocab_size,
        ).as_dict()
        if self.with_ends:
            batch[EXAMPLE_ENDS] = torch.tensor([len(example["input_ids"]) for example in examples]).cumsum(0)
        return batch


def collators(trainer: Any, completion_only: bool, *, own: bool) -> tuple[Any, Any]:
    """The collator of a run's batches, and the one with a padded row per example.

    Args:
        trainer: an `UnslothTrainer` with the collator that TRL made or was given.
        completion_only: as in `PackedCollator`.
        own: whether the collator is the user's, which then makes all batches.
    """
    given = trainer.data_collator
    if own:
        return given, given
    padding = copy.copy(given)
    padding.padding_free = False  # with packing TRL builds it padding-free
    if not trainer.padding_free:
        return padding, padding
    packed = PackedCollator(
        pad_token_id=given.pad_token_id,
        padding_free=True,
        pad_to_multiple_of=trainer.args.pad_to_multiple_of,
        collate=trainer.backend.training.collate,
        vocab_size=getattr(trainer.model.config.get_text_config(), "vocab_size", None),
        completion_only=completion_only,
        with_ends=bool(trainer.args.pad_to_multiple_of),
    )
    return packed, padding


def has_labels(batch: object) -> bool:
    """Whether a batch is a dictionary with a tensor of labels."""
    return isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)


def check_batch(batch: object, *, with_labels: bool) -> Mapping[str, Any]:
    """The batch, whose columns are tensors. Only a user's own data collator makes others.

    Args:
        batch: as the collator made it.
        with_labels: whether it must have labels.

    Raises:
        ValueError: what the batch has, and what is allowed.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"data_collator: got a batch of type {type(batch).__name__}; {_ALLOWED}")
    others = [f"{name!r} ({type(batch[name]).__name__})" for name in COLUMNS if _is_array(batch.get(name))]
    if others:
        raise ValueError(
            f"data_collator: got {', '.join(others)} in a batch; allowed: a torch.Tensor under each of these keys, its "
            "rows padded to one length"
        )
    if with_labels and not has_labels(batch):
        keys = ", ".join(map(repr, batch))
        raise ValueError(f"data_collator: got a batch without a tensor of labels (the keys {keys}); {_ALLOWED}")
    return batch


def _is_array(value: object) -> bool:
    """Whether the value holds numbers in another form than a tensor, such as a list or an array of numpy."""
    return isinstance(value, list | tuple) or (hasattr(value, "__array__") and not isinstance(value, Tensor))


def without_ends(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The model's part of a batch, and where each example ends in the row; None if it is not known."""
    inputs = dict(batch)
    ends = inputs.pop(EXAMPLE_ENDS, None)
    return inputs, ends


def without_repeated(labels: Tensor, ends: Tensor | None, new: int) -> Tensor:
    """The labels of a batch whose last examples repeat earlier ones, without the targets of those repeats.

    Args:
        labels: [B, S].
        ends: [examples] int64, where each example ends if all are in one row; None for one row per example.
        new: how many examples are not repeats; may be negative, or more than all.

    Returns:
        [B, S], a copy.
    """
    labels, new = labels.clone(), max(new, 0)
    if ends is None:
        labels[new:] = IGNORE_INDEX
    elif new < len(ends):
        labels[:, ends[new - 1] if new else 0 :] = IGNORE_INDEX
    return labels

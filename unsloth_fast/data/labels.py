"""Labels: which tokens are trained on, and the refusal of a data set that has none.

A label is the token itself, or -100 where the token is not trained on. The first token of a document is never a
target, since no earlier token predicts it.
"""

import logging
from collections.abc import Iterable
from itertools import islice

import numpy as np
from datasets import Dataset, IterableDataset

from unsloth_fast.data.lists import flat, has_lists
from unsloth_fast.data.truncation import Truncation
from unsloth_fast.data.types import Rows, TokenRow
from unsloth_ref.checks import counted
from unsloth_ref.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

STREAM_CHECK = 1000  # documents at the start of a stream that are searched for a target


def labels_of(example: TokenRow, completion_only: bool) -> dict[str, list[int]]:
    """The labels of an example that has none: its tokens, and -100 where one of its masks is 0.

    TRL derives them since 1.7.

    Args:
        example: with input_ids; may have completion_mask and assistant_masks, one value per token.
        completion_only: whether completion_mask counts.

    Returns:
        {"labels": ...}, or {} where the example has labels.
    """
    if "labels" in example:
        return {}
    names = (*(("completion_mask",) if completion_only else ()), "assistant_masks")
    masks = [example[name] for name in names if name in example]
    columns = zip(example["input_ids"], *masks, strict=True)
    return {"labels": [token if all(mask) else IGNORE_INDEX for token, *mask in columns]}


def with_labels(dataset: Dataset, completion_only: bool) -> Dataset:
    """The data set with a column "labels", derived from its tokens and masks; the columns of masks are dropped."""
    if not has_lists(dataset, "input_ids") or "labels" in dataset.column_names:
        return dataset
    masks = [name for name in ("completion_mask", "assistant_masks") if name in dataset.column_names]
    return dataset.map(labels_of, fn_kwargs={"completion_only": completion_only}, remove_columns=masks)


def require_targets(
    dataset: Dataset, name: str, truncation: Truncation | None = None, *, drop_empty: bool = False
) -> Dataset:
    """Refuse a data set without a target; log what truncation cuts off and how many documents have no target.

    Args:
        dataset: with a column "labels" of lists of integers, one list per document.
        name: of the data set, for messages.
        truncation: what is cut off later; None for nothing.
        drop_empty: whether to drop the documents without a target. They change nothing where documents are separate.

    Returns:
        The data set, without the dropped documents.

    Raises:
        ValueError: no token is a target.
    """
    truncation = truncation or Truncation()
    labels, lengths = flat(dataset, "labels")
    targets = labels.to_numpy(zero_copy_only=False) != IGNORE_INDEX
    before = np.concatenate(([0], targets.cumsum()))  # targets before each token
    kept = truncation.lengths(lengths)
    ends = lengths.cumsum() - (0 if truncation.keep_end else lengths - kept)
    has_target = before[ends] > before[np.minimum(ends - kept + 1, ends)]
    if not has_target.any():
        raise ValueError(_no_target(name, counted(len(lengths), "document"), truncation))
    if (lost := lengths - kept).any():
        documents = counted(int((lost > 0).sum()), "document")
        logger.warning(
            "%s: max_length=%d cuts %s off %s; a larger max_length keeps documents whole, packing=True with "
            "packing_strategy='bfd_split' in pieces",
            *(name, truncation.max_length, counted(lost.sum(), "token"), documents),
        )
    if has_target.all():
        return dataset
    empty = np.count_nonzero(~has_target)
    logger.warning("%s: documents without a target do not change the loss: %d of %d", name, empty, len(lengths))
    return dataset.select(np.flatnonzero(has_target)) if drop_empty else dataset


def require_targets_in_stream(
    rows: IterableDataset | Iterable[TokenRow],
    name: str,
    truncation: Truncation | None = None,
    *,
    completion_only: bool = False,
) -> None:
    """Search the first documents of a stream for a target; training reads the stream from its start again.

    Args:
        rows: tokenized, with or without labels.
        name: of the data set, for messages.
        truncation: as in `require_targets`.
        completion_only: whether a completion_mask counts, where the rows have no labels yet.

    Raises:
        ValueError: the stream ends without a target. If only its first documents have none, a warning is logged.
    """
    truncation = truncation or Truncation()
    count = 0
    for row in islice(rows, STREAM_CHECK):
        labels = (dict(row) | labels_of(row, completion_only))["labels"]
        count += 1
        if any(label != IGNORE_INDEX for label in truncation.apply(labels)[1:]):
            return
    if count < STREAM_CHECK:
        raise ValueError(_no_target(name, counted(count, "document"), truncation))
    logger.warning(_no_target(name, f"the first {count} documents", truncation))


def require_kept_labels(given: Rows, prepared: Rows, name: str) -> None:
    """Refuse a stream whose labels were lost while it was prepared.

    Raises:
        ValueError: TRL before 1.7 packs the tokens of a stream alone, and would train on every token.
    """
    if "labels" in next(iter(given)) and "labels" not in next(iter(prepared), ("labels",)):
        raise ValueError(
            f"{name}: got a stream with labels to pack, which the installed trl drops; allowed: a data set that is "
            "not a stream, packing=False, or a newer trl"
        )


def _no_target(name: str, documents: str, truncation: Truncation) -> str:
    cut = "" if truncation.max_length is None else f" within max_length={truncation.max_length} tokens"
    return (
        f"{name}: got no target in {documents}{cut}; allowed: at least one label that is not {IGNORE_INDEX} "
        "after a document's first token (check labels, completion_mask and assistant_masks)"
    )

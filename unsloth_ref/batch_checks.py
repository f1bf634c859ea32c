"""The contract's checks of lengths, plans, examples and batches; both backends call them, so both raise the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.types import IGNORE_INDEX, PackedBatch, PackingPlan

STRATEGIES = ("bfd", "bfd_split", "wrapped")


def at_least_one(name: str, value: int) -> None:
    """Raise unless value is a whole number (TypeError) from 1 (ValueError)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; allowed: a whole number from 1")
    if value < 1:
        raise ValueError(f"{name}: got {value}; allowed: a whole number from 1")


def lengths_tensor(lengths: Sequence[int] | Tensor) -> Tensor:
    """The lengths as one int64 tensor on the CPU.

    Raises:
        TypeError: they are not whole numbers.
        ValueError: they are not one row, or one is negative.
    """
    found = torch.as_tensor(lengths)
    if found.numel() == 0:
        found = found.to(torch.int64)
    checks.dimensions("lengths", found, 1, "[documents]")
    checks.dtype("lengths", found, checks.INTEGERS)
    wrong = found < 0
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(f"lengths: got {int(found[index])} at index {index}; allowed: whole numbers from 0")
    return found.to("cpu", torch.int64)


def plan_fits(plan: PackingPlan, offsets: Tensor) -> None:
    """Raise unless offsets [documents + 1] cut a column into documents that hold every span of the plan."""
    checks.dimensions("offsets", offsets, 1, "[documents + 1]")
    checks.dtype("offsets", offsets, checks.INTEGERS)
    if not len(plan.documents):
        return
    documents, needed = len(offsets) - 1, int(plan.documents.max()) + 1
    if documents < needed:
        raise ValueError(
            f"offsets: got {len(offsets)} of them; allowed: at least {needed + 1}, one more than documents"
        )
    ends = plan.starts + plan.lengths
    missing = ends > (offsets[1:] - offsets[:-1])[plan.documents]
    if missing.any():
        span = int(missing.nonzero()[0])
        document = int(plan.documents[span])
        held = int(offsets[document + 1] - offsets[document])
        raise ValueError(
            f"offsets: got {held} tokens for document {document};"
            f" allowed: at least {int(ends[span])}, which the plan takes"
        )


def example_has_tokens(index: int, example: Mapping[str, Any]) -> None:
    """Raise ValueError for an example without input_ids."""
    if example.get("input_ids") is None:
        raise ValueError(
            f"examples: got example {index} with {', '.join(example) or 'nothing'}; allowed: with input_ids"
        )


def example_fits(index: int, tokens: int, labels: int, lengths: Sequence[int]) -> None:
    """Raise ValueError unless an example has a label a token, and its documents have its tokens together."""
    if labels != tokens:
        raise ValueError(f"labels: got {labels} in example {index}; allowed: {tokens}, one a token")
    if min(lengths, default=0) < 0 or sum(lengths) != tokens:
        raise ValueError(
            f"seq_lengths: got {list(lengths)} in example {index};"
            f" allowed: numbers from 0 that add up to {tokens}, its tokens"
        )


def some_tokens(count: int) -> None:
    """Raise ValueError for a batch without tokens."""
    if count == 0:
        raise ValueError("examples: got no token at all; allowed: at least one")


def batch_in_vocabulary(batch: PackedBatch, vocab_size: int | None) -> None:
    """Raise ValueError for a token or a label that is not below vocab_size; None for any."""
    if vocab_size is None:
        return
    for name, values, ignored in (("input_ids", batch.input_ids[0], None), ("labels", batch.labels[0], IGNORE_INDEX)):
        wrong = (values < 0) | (values >= vocab_size)
        if ignored is not None:
            wrong &= values != ignored
        if wrong.any():
            index = int(wrong.nonzero()[0])
            allowed = f"0 to {vocab_size - 1}" + (f", or {ignored}" if ignored is not None else "")
            raise ValueError(f"{name}: got {int(values[index])} at token {index} of the batch; allowed: {allowed}")

"""The contract's checks of lengths, packing plans, examples and batches. Both backends call them: same errors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unsloth_ref import checks
from unsloth_ref.types import IGNORE_INDEX, Column, Example, PackedBatch, PackingPlan

STRATEGIES = ("bfd", "bfd_split", "wrapped")


def at_least_one(name: str, value: int) -> None:
    """Raise TypeError unless the value is an integer, ValueError unless it is at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}; allowed: an integer of at least 1")
    if value < 1:
        raise ValueError(f"{name}: got {value}; allowed: an integer of at least 1")


def lengths_tensor(lengths: Sequence[int] | Tensor) -> Tensor:
    """Convert lengths to a one-dimensional int64 tensor on the CPU.

    Raises:
        TypeError: lengths are not integers.
        ValueError: lengths are not one-dimensional, or one is negative.
    """
    found = torch.as_tensor(lengths)
    if found.numel() == 0:
        found = found.to(torch.int64)
    checks.dimensions("lengths", found, 1, "[documents]")
    checks.dtype("lengths", found, checks.INTEGERS)
    wrong = found < 0
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(f"lengths: got {int(found[index])} at index {index}; allowed: integers of at least 0")
    return found.to("cpu", torch.int64)


def plan_fits(plan: PackingPlan, offsets: Tensor) -> None:
    """Raise unless offsets [documents + 1] are of documents that contain every span of the plan."""
    checks.dimensions("offsets", offsets, 1, "[documents + 1]")
    checks.dtype("offsets", offsets, checks.INTEGERS)
    if not len(plan.documents):
        return
    documents, needed = len(offsets) - 1, int(plan.documents.max()) + 1
    if documents < needed:
        raise ValueError(
            f"offsets: got {checks.counted(len(offsets), 'offset')}; allowed: at least {needed + 1}, the number of "
            "documents plus 1"
        )
    ends = plan.starts + plan.lengths
    missing = ends > (offsets[1:] - offsets[:-1])[plan.documents]
    if missing.any():
        span = int(missing.nonzero()[0])
        document = int(plan.documents[span])
        held = int(offsets[document + 1] - offsets[document])
        raise ValueError(
            f"offsets: got {checks.counted(held, 'token')} for document {document}; allowed: at least "
            f"{int(ends[span])}, as in the plan"
        )


def input_ids_of(index: int, example: Example) -> Column:
    """Return the input_ids of an example; raise ValueError if it has none."""
    tokens = example.get("input_ids")
    if tokens is None:
        raise ValueError(
            f"examples: got example {index} with {', '.join(example) or 'no key'}; allowed: examples with input_ids"
        )
    return tokens


def example_fits(index: int, tokens: int, labels: int, lengths: Sequence[int]) -> None:
    """Raise ValueError unless an example has one label per token, and its seq_lengths sum to its number of tokens."""
    if labels != tokens:
        raise ValueError(
            f"labels: got {checks.counted(labels, 'label')} in example {index}; allowed: {tokens}, one per token"
        )
    if min(lengths, default=0) < 0 or sum(lengths) != tokens:
        raise ValueError(
            f"seq_lengths: got {list(lengths)} in example {index};"
            f" allowed: non-negative integers that sum to {tokens}, its number of tokens"
        )


def some_tokens(count: int) -> None:
    """Raise ValueError if a batch has no tokens."""
    if count == 0:
        raise ValueError("examples: got no tokens; allowed: at least one")


def batch_in_vocabulary(batch: PackedBatch, vocab_size: int | None) -> None:
    """Raise ValueError if a token or a label is outside the vocabulary; None allows all."""
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

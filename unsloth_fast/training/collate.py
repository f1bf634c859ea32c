"""Collation: one row of all documents, in a handful of tensor operations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unsloth_ref.batch_checks import (
    at_least_one,
    batch_in_vocabulary,
    example_fits,
    example_has_tokens,
    some_tokens,
)
from unsloth_ref.types import IGNORE_INDEX, PackedBatch


def collate(
    examples: Sequence[Mapping[str, Any]],
    *,
    pad_to_multiple_of: int | None = None,
    pad_token_id: int = 0,
    vocab_size: int | None = None,
) -> PackedBatch:
    """Lay the documents of all examples into one row.

    Args:
        examples: each with "input_ids" [S]; may have "labels" [S], -100 where a token is no target (the tokens
            themselves where they are missing), and "seq_lengths", tokens of each document in a packed row (one
            document where they are missing; zeros are left out). Lists of whole numbers or integer tensors; other keys
            are not looked at.
        pad_to_multiple_of: the row is filled up to a multiple of this with one more document that is no target.
        pad_token_id: what it is filled up with.
        vocab_size: where given, tokens and labels must be below it.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: no token at all, an example without input_ids, labels or seq_lengths that do not fit the tokens, a
            token or label outside the vocabulary, or pad_to_multiple_of below 1.
        TypeError: pad_to_multiple_of is no whole number.
    """
    if pad_to_multiple_of is not None:
        at_least_one("pad_to_multiple_of", pad_to_multiple_of)
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    lengths: list[int] = []
    for index, example in enumerate(examples):
        example_has_tokens(index, example)
        row = _integers(example["input_ids"])
        own = row if example.get("labels") is None else _integers(example["labels"])
        parts = [len(row)] if example.get("seq_lengths") is None else _integers(example["seq_lengths"]).tolist()
        example_fits(index, len(row), len(own), parts)
        tokens.append(row)
        labels.append(own)
        lengths += [length for length in parts if length]
    some_tokens(sum(lengths))
    padding = -sum(lengths) % (pad_to_multiple_of or 1)
    if padding:
        tokens.append(torch.full((padding,), pad_token_id))
        labels.append(torch.full((padding,), IGNORE_INDEX))
        lengths.append(padding)

    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(ends.diff())
    targets = torch.cat(labels)
    targets[ends[:-1]] = IGNORE_INDEX
    batch = PackedBatch(torch.cat(tokens)[None], targets[None], positions[None], ends.to(torch.int32), max(lengths))
    batch_in_vocabulary(batch, vocab_size)
    return batch


def _integers(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64, device="cpu")

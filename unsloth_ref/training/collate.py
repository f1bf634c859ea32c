"""Collation: the documents of a batch one after the other in a single row, without padding between them.

Each document keeps its own positions, and no token is trained to foresee the next document: labels are not shifted
here, so the label at a document's first token is the target of the last token before it, and becomes -100.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
    tokens: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for index, example in enumerate(examples):
        example_has_tokens(index, example)
        row = [int(token) for token in example["input_ids"]]
        own = [int(label) for label in _given(example, "labels", row)]
        parts = [int(length) for length in _given(example, "seq_lengths", [len(row)])]
        example_fits(index, len(row), len(own), parts)
        tokens += row
        labels += own
        lengths += [length for length in parts if length > 0]
    some_tokens(len(tokens))
    padding = -len(tokens) % (pad_to_multiple_of or 1)
    if padding:
        tokens += [pad_token_id] * padding
        labels += [IGNORE_INDEX] * padding
        lengths.append(padding)

    positions: list[int] = []
    ends = [0]
    for length in lengths:
        labels[ends[-1]] = IGNORE_INDEX
        positions += range(length)
        ends.append(ends[-1] + length)
    batch = PackedBatch(
        input_ids=torch.tensor([tokens], dtype=torch.int64),
        labels=torch.tensor([labels], dtype=torch.int64),
        position_ids=torch.tensor([positions], dtype=torch.int64),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        max_seqlen=max(lengths),
    )
    batch_in_vocabulary(batch, vocab_size)
    return batch


def _given(example: Mapping[str, Any], name: str, default: Sequence[int]) -> Any:
    return default if example.get(name) is None else example[name]

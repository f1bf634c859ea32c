"""Collation in a few tensor operations on the whole row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unsloth_ref.batch_checks import (
    at_least_one,
    batch_in_vocabulary,
    example_fits,
    input_ids_of,
    some_tokens,
)
from unsloth_ref.types import IGNORE_INDEX, Column, Example, PackedBatch


def collate(
    examples: Sequence[Example],
    *,
    pad_to_multiple_of: int | None = None,
    pad_token_id: int = 0,
    vocab_size: int | None = None,
) -> PackedBatch:
    """Concatenate the documents of all examples into one row.

    Args:
        examples: each has "input_ids" [S]. It may have "labels" [S], -100 at tokens that are not targets (default:
            input_ids), and "seq_lengths" [documents], the number of tokens of each document in a packed row (default:
            one document; zeros are ignored). Lists of integers or integer tensors. Other keys are ignored.
        pad_to_multiple_of: pad the row to a multiple of this. The padding is one more document, without targets.
        pad_token_id: the token to pad with.
        vocab_size: if not None, tokens and labels must be below it.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: there are no tokens; an example has no input_ids, or its labels or seq_lengths do not match them; a
            token or a label is outside the vocabulary; or pad_to_multiple_of is below 1.
        TypeError: pad_to_multiple_of is not an integer.
    """
    if pad_to_multiple_of is not None:
        at_least_one("pad_to_multiple_of", pad_to_multiple_of)
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    lengths: list[int] = []
    for index, example in enumerate(examples):
        row = _integers(input_ids_of(index, example))
        own_labels, own_lengths = example.get("labels"), example.get("seq_lengths")
        own = row if own_labels is None else _integers(own_labels)
        parts = [len(row)] if own_lengths is None else _integers(own_lengths).tolist()
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


def _integers(column: Column) -> Tensor:
    return torch.as_tensor(column, dtype=torch.int64, device="cpu")

"""Collation: the documents of a batch are concatenated into a single row, without padding between them.

Each document has its own positions. No token is trained to predict the next document: labels are not shifted here, so
the label at the first token of a document would be the target of the last token of the document before, and becomes
-100.
"""

from collections.abc import Sequence

import torch

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
    tokens: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for index, example in enumerate(examples):
        row = [int(token) for token in input_ids_of(index, example)]
        own = [int(label) for label in _column(example, "labels", default=row)]
        parts = [int(length) for length in _column(example, "seq_lengths", default=[len(row)])]
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


def _column(example: Example, name: str, default: Column) -> Column:
    column = example.get(name)
    return default if column is None else column

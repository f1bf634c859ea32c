"""Wrong and right implementations of collate."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tests.judge.pieces import Collected
from unsloth_ref import batch_checks, training
from unsloth_ref.types import IGNORE_INDEX, PackedBatch

collected = Collected()
Examples = Sequence[dict[str, Any]]


def integers(values: Any) -> list[int]:
    """Convert a column to a list."""
    return [int(value) for value in values]


def raw_labels(examples: Examples, batch: PackedBatch) -> torch.Tensor:
    """The labels of the examples, without masked boundaries; the padding is ignored."""
    found = [label for example in examples for label in integers(example.get("labels", example["input_ids"]))]
    return torch.tensor([found + [IGNORE_INDEX] * (batch.labels.numel() - len(found))])


@collected.passes("collate")
def by_numpy(
    examples: Examples,
    *,
    pad_to_multiple_of: int | None = None,
    pad_token_id: int = 0,
    vocab_size: int | None = None,
) -> PackedBatch:
    """Uses NumPy, document by document."""
    if pad_to_multiple_of is not None:
        batch_checks.at_least_one("pad_to_multiple_of", pad_to_multiple_of)
    tokens, labels, lengths = [], [], []
    for index, example in enumerate(examples):
        row = np.array(batch_checks.input_ids_of(index, example), np.int64)
        own = np.array(example.get("labels", row), np.int64)
        parts = np.array(example.get("seq_lengths", [len(row)]), np.int64).tolist()
        batch_checks.example_fits(index, len(row), len(own), parts)
        for length in filter(None, parts):
            tokens.append(row[:length])
            labels.append(np.concatenate([[IGNORE_INDEX], own[1:length]]))
            lengths.append(length)
            row, own = row[length:], own[length:]
    batch_checks.some_tokens(sum(lengths))
    padding = -sum(lengths) % (pad_to_multiple_of or 1)
    if padding:
        tokens.append(np.full(padding, pad_token_id))
        labels.append(np.full(padding, IGNORE_INDEX))
        lengths.append(padding)
    row_tensors = [
        torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
        for parts in (tokens, labels, [np.arange(length) for length in lengths])
    ]
    ends = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
    batch = PackedBatch(*row_tensors, ends, max(lengths))
    batch_checks.batch_in_vocabulary(batch, vocab_size)
    return batch


@collected.passes("collate")
def one_document_at_a_time(
    examples: Examples,
    *,
    pad_to_multiple_of: int | None = None,
    pad_token_id: int = 0,
    vocab_size: int | None = None,
) -> PackedBatch:
    """Makes every document an example of its own."""
    alone: list[dict[str, Any]] = []
    for index, example in enumerate(examples):
        row = integers(batch_checks.input_ids_of(index, example))
        own = integers(example.get("labels", row))
        parts = integers(example.get("seq_lengths", [len(row)]))
        batch_checks.example_fits(index, len(row), len(own), parts)
        first = 0
        for length in parts:
            alone.append({"input_ids": row[first : first + length], "labels": own[first : first + length]})
            first += length
    return training.collate(
        alone, pad_to_multiple_of=pad_to_multiple_of, pad_token_id=pad_token_id, vocab_size=vocab_size
    )


@collected.fails("collate", "packed_equals_per_document")
def boundaries_unmasked(examples: Examples, **options: Any) -> PackedBatch:
    """The last token of a document is trained to predict the next document."""
    batch = training.collate(examples, **options)
    return replace(batch, labels=raw_labels(examples, batch))


@collected.fails("collate", "targets")
def ends_masked(examples: Examples, **options: Any) -> PackedBatch:
    """Masks the last label of each document, as would be right for shifted labels."""
    batch = training.collate(examples, **options)
    labels = raw_labels(examples, batch)
    labels[0, batch.cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    return replace(batch, labels=labels)


@collected.fails("collate", "packed_equals_per_document")
def positions_run_on(examples: Examples, **options: Any) -> PackedBatch:
    """Positions continue from one document to the next."""
    batch = training.collate(examples, **options)
    return replace(batch, position_ids=torch.arange(batch.labels.numel())[None])


@collected.fails("collate", "packed_equals_per_document")
def documents_joined(examples: Examples, **options: Any) -> PackedBatch:
    """Attention sees the row as one document."""
    batch = training.collate(examples, **options)
    return replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]], max_seqlen=batch.labels.numel())


@collected.fails("collate", "documents_apart")
def examples_for_documents(examples: Examples, **options: Any) -> PackedBatch:
    """seq_lengths are ignored."""
    return training.collate([{n: v for n, v in e.items() if n != "seq_lengths"} for e in examples], **options)


@collected.fails("collate", "positions_restart")
def empty_documents_merge_their_neighbours(examples: Examples, **options: Any) -> PackedBatch:
    """Positions continue after a document without tokens."""
    batch = training.collate(examples, **options)
    positions = batch.position_ids.clone()
    first = 0
    for example in examples:
        before = 1
        for length in integers(example.get("seq_lengths", [len(example["input_ids"])])):
            if not before and first:
                positions[0, first : first + length] += positions[0, first - 1] + 1
            first, before = first + length, length
    return replace(batch, position_ids=positions)


@collected.fails("collate", "documents_apart")
def padding_token_by_token(examples: Examples, **options: Any) -> PackedBatch:
    """Each padding token is a document."""
    batch = training.collate(examples, **options)
    held = sum(len(example["input_ids"]) for example in examples)
    ends = [end for end in batch.cu_seqlens.tolist() if end <= held]
    ends += range(held + 1, batch.labels.numel() + 1)
    return replace(batch, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


@collected.fails("collate", "targets")
def padding_trained(examples: Examples, **options: Any) -> PackedBatch:
    """Padding tokens are targets."""
    batch = training.collate(examples, **options)
    held = sum(len(example["input_ids"]) for example in examples)
    labels = batch.labels.clone()
    labels[0, held:] = batch.input_ids[0, held:]
    return replace(batch, labels=labels)


@collected.fails("collate", "targets")
def labels_of_the_first_example_decide(examples: Examples, **options: Any) -> PackedBatch:
    """If the first example has no labels, the labels of the others are ignored."""
    if "labels" not in examples[0]:
        examples = [{n: v for n, v in e.items() if n != "labels"} for e in examples]
    return training.collate(examples, **options)


@collected.fails("collate", "documents_apart")
def int64_cu_seqlens(examples: Examples, **options: Any) -> PackedBatch:
    """cu_seqlens have a dtype that attention kernels reject or misread."""
    batch = training.collate(examples, **options)
    return replace(batch, cu_seqlens=batch.cu_seqlens.long())


@collected.fails("collate", "documents_apart")
def longest_example_for_longest_document(examples: Examples, **options: Any) -> PackedBatch:
    """max_seqlen is the length of the longest example."""
    batch = training.collate(examples, **options)
    return replace(batch, max_seqlen=max(len(example["input_ids"]) for example in examples))


@collected.fails("collate", "documents_apart")
def with_attention_mask(examples: Examples, **options: Any) -> PackedBatch:
    """Adds an all-ones mask, with which models see the row as one document."""

    class Masked(PackedBatch):
        def as_dict(self) -> dict[str, Any]:
            """Add the mask."""
            return {**super().as_dict(), "attention_mask": torch.ones_like(self.input_ids)}

    batch = training.collate(examples, **options)
    return Masked(**vars(batch))


@collected.fails("collate", "inputs_untouched")
def writes_seq_lengths(examples: Examples, **options: Any) -> PackedBatch:
    """Writes the seq_lengths that it computes into the examples."""
    batch = training.collate(examples, **options)
    for example in examples:
        example.setdefault("seq_lengths", [len(example["input_ids"])])
    return batch


@collected.fails("collate", "error_parity")
def vocabulary_unread(examples: Examples, *, vocab_size: int | None = None, **options: Any) -> PackedBatch:
    """Does not check tokens and labels against the vocabulary."""
    return training.collate(examples, **options)


@collected.fails("collate", "error_parity")
def lengths_mended(examples: Examples, **options: Any) -> PackedBatch:
    """If seq_lengths do not match the tokens, the example is one document."""
    mended = []
    for example in examples:
        lengths = integers(example.get("seq_lengths", []))
        fits = sum(lengths) == len(example.get("input_ids", []))
        mended.append(example if fits else {n: v for n, v in example.items() if n != "seq_lengths"})
    return training.collate(mended, **options)


@collected.fails("collate", "documents_apart", "targets")
def vocabulary_by_default(examples: Examples, *, vocab_size: int | None = None, **options: Any) -> PackedBatch:
    """Without the size of the vocabulary, refuses tokens that are not below 10."""
    return training.collate(examples, vocab_size=vocab_size or 10, **options)

"""The collation of documents into one row."""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import UNIT, Arguments, equal, inputs_untouched
from conformance.tolerances.gates import Failure
from unsloth_ref import kernels, training
from unsloth_ref.types import IGNORE_INDEX, PackedBatch

VOCAB, WIDTH, PAD = 13, 4, 5


@dataclass(frozen=True)
class CollateCase(PieceCase):
    """Examples to collate.

    Attributes:
        examples: the lengths of the documents of each example.
        multiple: pad_to_multiple_of.
        labels: the examples that have labels: "none", "all" or "some".
        tensors: whether columns are tensors instead of lists; of odd seeds in int32.
        limited: whether the size of the vocabulary is passed.
        seed: the seed of tokens and labels.
    """

    examples: tuple[tuple[int, ...], ...]
    multiple: int | None = None
    labels: str = "none"
    tensors: bool = False
    limited: bool = True
    seed: int = 0


def draw(elements: int) -> st.SearchStrategy[CollateCase]:
    """A few examples of a few documents, some of them empty."""
    length = st.one_of(st.integers(1, 6), st.sampled_from([0, 1, 17]))
    example = st.lists(length, min_size=1, max_size=4).map(tuple)
    return st.builds(
        CollateCase,
        examples=st.lists(example, min_size=1, max_size=4).map(tuple).filter(lambda found: any(map(sum, found))),
        multiple=st.sampled_from([None, 1, 2, 8, 64]),
        labels=st.sampled_from(["none", "all", "some"]),
        tensors=st.booleans(),
        limited=st.booleans(),
        seed=st.integers(0, 3),
    )


def examples(case: CollateCase) -> list[dict[str, Any]]:
    """The examples to collate; only those of several documents have seq_lengths."""
    generator = Generator().manual_seed(case.seed)
    found = []
    for index, documents in enumerate(case.examples):
        tokens = torch.randint(VOCAB, (sum(documents),), generator=generator)
        labels = torch.randint(VOCAB, (sum(documents),), generator=generator)
        labels[torch.rand(len(labels), generator=generator) < 0.25] = IGNORE_INDEX
        example = {"input_ids": tokens}
        if case.labels == "all" or (case.labels == "some" and index % 2):
            example["labels"] = labels
        if len(documents) > 1:
            example["seq_lengths"] = torch.tensor(documents)
        if not case.tensors:
            found.append({name: column.tolist() for name, column in example.items()})
        else:
            found.append({name: column.int() for name, column in example.items()} if case.seed % 2 else example)
    return found


def arguments(case: CollateCase, device: str) -> Arguments:
    """The arguments; vocab_size is the smallest that is valid, or not passed."""
    keywords = {"pad_to_multiple_of": case.multiple, "pad_token_id": PAD}
    return (examples(case),), keywords | ({"vocab_size": VOCAB} if case.limited else {})


def _batch(trial: PieceTrial, case: CollateCase) -> PackedBatch:
    positional, keywords = arguments(case, trial.device)
    return trial.function(*positional, **keywords)


def _documents(case: CollateCase) -> list[int]:
    """The lengths of the documents that have tokens."""
    return [length for documents in case.examples for length in documents if length]


def documents_apart(trial: PieceTrial, case: CollateCase) -> None:
    """cu_seqlens (int32) has every document, and one for the padding; max_seqlen is the longest of them."""
    batch, lengths = _batch(trial, case), _documents(case)
    padding = -sum(lengths) % (case.multiple or 1)
    wanted = [0, *accumulate([*lengths, padding] if padding else lengths)]
    if batch.cu_seqlens.dtype != torch.int32 or batch.cu_seqlens.tolist() != wanted:
        raise Failure(f"cu_seqlens is {batch.cu_seqlens.dtype} {batch.cu_seqlens.tolist()}, should be int32 {wanted}")
    if batch.max_seqlen != max([*lengths, padding]):
        raise Failure(f"max_seqlen is {batch.max_seqlen}, should be {max([*lengths, padding])}")
    keys = {"input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    if batch.as_dict().keys() != keys:
        raise Failure(f"as_dict() has the keys {', '.join(batch.as_dict())}; should be {', '.join(sorted(keys))}")


def positions_restart(trial: PieceTrial, case: CollateCase) -> None:
    """Positions start from 0 in every document."""
    batch = _batch(trial, case)
    ends = batch.cu_seqlens.tolist()
    wanted = [position for first, last in pairwise(ends) for position in range(last - first)]
    if batch.position_ids.tolist() != [wanted]:
        raise Failure(f"position_ids are {batch.position_ids.tolist()}, should be {[wanted]}")


def targets(trial: PieceTrial, case: CollateCase) -> None:
    """No token is trained to predict the next document or the padding; every other label is kept."""
    seen = [_batch(trial, case).labels[0].tolist(), _batch(trial, case).input_ids[0].tolist()]
    labels: list[int] = []
    tokens: list[int] = []
    for example, documents in zip(examples(case), case.examples, strict=True):
        row = torch.as_tensor(example["input_ids"], dtype=torch.int64).tolist()
        own = torch.as_tensor(example.get("labels", row), dtype=torch.int64).tolist()
        for first, length in zip(accumulate(documents, initial=0), documents, strict=False):
            labels += [IGNORE_INDEX] * (length > 0) + own[first + 1 : first + length]
        tokens += row
    padding = -len(tokens) % (case.multiple or 1)
    for name, found, wanted in (
        ("labels", seen[0], labels + [IGNORE_INDEX] * padding),
        ("input_ids", seen[1], tokens + [PAD] * padding),
    ):
        if found != wanted:
            raise Failure(f"{name} are {found}, should be {wanted}")


def packed_equals_per_document(trial: PieceTrial, case: CollateCase) -> float:
    """The loss of the packed row is that of its documents one by one, in a small float64 transformer."""
    batch = _batch(trial, case)
    count = int(training.count_targets([batch.labels]))
    together = _loss(batch.input_ids[0], batch.labels[0], batch.position_ids[0], batch.cu_seqlens.tolist(), count)
    alone = torch.zeros((), dtype=torch.float64)
    for example, documents in zip(examples(case), case.examples, strict=True):
        row = torch.as_tensor(example["input_ids"], dtype=torch.int64)
        own = torch.as_tensor(example.get("labels", row), dtype=torch.int64)
        for first, length in zip(accumulate(documents, initial=0), documents, strict=False):
            part = slice(first, first + length)
            alone += _loss(row[part], own[part], torch.arange(length), [0, length], count)
    # Each loss consists of a few sums over the document, the width and the vocabulary, and is summed over the tokens. A
    # sum of n terms has at most n roundings. Logits are below 8 in size, so a loss is below 16 + log(VOCAB).
    roundings = 4 * (max(batch.max_seqlen, 1) + 2 * WIDTH + VOCAB) + batch.labels.numel()
    allowed = roundings * UNIT * (16 + math.log(VOCAB))
    error = float((together - alone).abs())
    if not error <= allowed:
        raise Failure(f"loss {float(together)!r}, should be {float(alone)!r}; error {error:.2g}, allowed {allowed:.2g}")
    return error / allowed


def _loss(tokens: Tensor, labels: Tensor, positions: Tensor, ends: list[int], count: int) -> Tensor:
    """The summed loss divided by count: embeddings of tokens and positions, attention in each document, tied head."""
    generator = Generator().manual_seed(7)
    embedding = torch.rand(VOCAB, WIDTH, generator=generator, dtype=torch.float64) - 0.5
    places = torch.rand(64, WIDTH, generator=generator, dtype=torch.float64) - 0.5
    hidden = embedding[tokens] + places[positions]
    seen = torch.zeros_like(hidden)
    for first, last in pairwise(ends):
        own = hidden[first:last]
        scores = (4 * own @ own.T).masked_fill(torch.ones(last - first, last - first).triu(1).bool(), -math.inf)
        seen[first:last] = own + scores.softmax(-1) @ own
    logits = 4 * seen @ embedding.T
    return training.next_token_loss(
        logits[None], labels[None], cross_entropy=kernels.cross_entropy, num_items=max(count, 1)
    )


def _call(*found: dict[str, Any], **keywords: Any) -> Arguments:
    return (list(found),), keywords


piece = Piece(
    op="collate",
    draw=draw,
    checks=(
        documents_apart,
        positions_restart,
        targets,
        packed_equals_per_document,
        equal(arguments),
        inputs_untouched(arguments),
    ),
    simplest=CollateCase(((3, 2),)),
    mistakes=(
        Mistake("no example", lambda: _call(), ValueError, "examples"),
        Mistake("no token", lambda: _call({"input_ids": []}), ValueError, "examples"),
        Mistake("no input_ids", lambda: _call({"labels": [1, 2]}), ValueError, "examples"),
        Mistake("one label too few", lambda: _call({"input_ids": [1, 2], "labels": [1]}), ValueError, "labels"),
        Mistake(
            "seq_lengths longer than the row",
            lambda: _call({"input_ids": [1, 2], "seq_lengths": [1, 2]}),
            ValueError,
            "seq_lengths",
        ),
        Mistake(
            "seq_lengths shorter than the row",
            lambda: _call({"input_ids": [1, 2], "seq_lengths": [1]}),
            ValueError,
            "seq_lengths",
        ),
        Mistake(
            "a token outside the vocabulary", lambda: _call({"input_ids": [0, 9]}, vocab_size=9), ValueError, "ids"
        ),
        Mistake(
            "a label outside the vocabulary",
            lambda: _call({"input_ids": [0, 1], "labels": [0, 9]}, vocab_size=9),
            ValueError,
            "labels",
        ),
        Mistake(
            "a negative label that is not -100",
            lambda: _call({"input_ids": [0, 1], "labels": [0, -1]}, vocab_size=9),
            ValueError,
            "labels",
        ),
        Mistake(
            "padding to a multiple of 0", lambda: _call({"input_ids": [1]}, pad_to_multiple_of=0), ValueError, "pad_to"
        ),
    ),
)

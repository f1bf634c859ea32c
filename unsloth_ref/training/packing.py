"""Packing: documents of different lengths in rows of one capacity. `pack` describes the strategies.

Best fit decreasing needs at most 11/9 of the fewest rows possible, plus 4 (Johnson et al. 1974, SIAM J. Comput. 3(4)).
For language models: Ding et al. 2024, arXiv:2404.10830. A plan covers the whole data set.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unsloth_ref import batch_checks, checks
from unsloth_ref.types import PackingPlan, Strategy

Span = tuple[int, int, int]  # document, start, length


def pack(lengths: Sequence[int] | Tensor, capacity: int, *, strategy: Strategy = "bfd") -> PackingPlan:
    """Pack documents into rows of at most `capacity` tokens.

    "bfd" is best fit decreasing: the longest document first, each into the fullest row that has space for it. A
    document longer than a row is truncated. "bfd_split" splits such a document into pieces of `capacity` tokens and a
    shorter last piece, and packs the pieces in the same way. Ties: of equally long pieces, the first one in the data is
    first; of equally full rows, the one that was filled to this level first is chosen. "wrapped" concatenates the
    documents in their own order and splits them wherever a row is full.

    Args:
        lengths: number of tokens of each document, at least 0; a tensor is [documents], int32 or int64. Documents
            without tokens are dropped.
        capacity: largest number of tokens of a row, at least 1.
        strategy: "bfd", "bfd_split" or "wrapped".

    Returns:
        The plan: rows in the order in which they were started, the spans of a row in the order in which they were
        added.

    Raises:
        ValueError: a negative length, a capacity below 1, an unknown strategy, or lengths that are not [documents].
        TypeError: lengths or capacity are not integers.
    """
    batch_checks.at_least_one("capacity", capacity)
    checks.one_of("strategy", strategy, batch_checks.STRATEGIES)
    documents = batch_checks.lengths_tensor(lengths).tolist()
    if strategy == "wrapped":
        return _plan(_wrapped(documents, capacity))
    if strategy == "bfd":
        pieces = [(document, 0, min(length, capacity)) for document, length in enumerate(documents) if length]
    else:
        pieces = [
            (document, start, min(length - start, capacity))
            for document, length in enumerate(documents)
            for start in range(0, length, capacity)
        ]
    return _plan(_best_fit(sorted(pieces, key=lambda piece: -piece[2]), capacity))


def packed_indices(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """Return the index of each packed token in a flat column: packed = flat[packed_indices(plan, offsets)].

    Args:
        plan: the `pack` of the same documents.
        offsets: [documents + 1] int32 or int64, the index of the first token of each document in the flat column, and
            the size of the column at the end.

    Returns:
        [tokens in the plan] int64, row by row.

    Raises:
        ValueError: offsets are not one-dimensional, or a document has fewer tokens than the plan uses.
        TypeError: offsets are not int32 or int64.
    """
    batch_checks.plan_fits(plan, offsets)
    indices = []
    for document, start, length in zip(*_lists(plan), strict=True):
        first = int(offsets[document]) + start
        indices.extend(range(first, first + length))
    return torch.tensor(indices, dtype=torch.int64)


def _best_fit(pieces: list[Span], capacity: int) -> list[list[Span]]:
    rows: list[list[Span]] = []
    free: list[int] = []
    since: list[int] = []  # the time at which a row reached its free space
    for time, piece in enumerate(pieces):
        fitting = [row for row in range(len(rows)) if free[row] >= piece[2]]
        if fitting:
            best = min(fitting, key=lambda row: (free[row], since[row]))
        else:
            best = len(rows)
            rows.append([])
            free.append(capacity)
            since.append(time)
        rows[best].append(piece)
        free[best] -= piece[2]
        since[best] = time
    return rows


def _wrapped(documents: list[int], capacity: int) -> list[list[Span]]:
    rows: list[list[Span]] = []
    space = 0
    for document, length in enumerate(documents):
        start = 0
        while start < length:
            if space == 0:
                rows.append([])
                space = capacity
            taken = min(space, length - start)
            rows[-1].append((document, start, taken))
            start, space = start + taken, space - taken
    return rows


def _plan(rows: list[list[Span]]) -> PackingPlan:
    spans = [span for row in rows for span in row]
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row))
    documents, starts, lengths = (torch.tensor([span[part] for span in spans], dtype=torch.int64) for part in range(3))
    return PackingPlan(documents, starts, lengths, torch.tensor(offsets, dtype=torch.int64))


def _lists(plan: PackingPlan) -> tuple[list[int], list[int], list[int]]:
    return plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist()

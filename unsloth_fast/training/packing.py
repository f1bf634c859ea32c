"""Packing: documents of equal length in one step, and NumPy for the spans.

Best fit decreasing packs all documents of one length in succession. A row with free space f then receives f // length
of them before any other row receives one, because what remains of its space is still the best fit. So one step fills a
whole range of rows in the same way, and leaves each with less than half of its free space: there are at most
log2(capacity) steps per range. Each distinct length adds at most three ranges.
"""

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unsloth_ref import batch_checks, checks
from unsloth_ref.types import PackingPlan, Strategy


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
    documents = batch_checks.lengths_tensor(lengths).numpy()
    if strategy == "wrapped":
        return _wrapped(documents, capacity)
    if strategy == "bfd":
        owners = np.flatnonzero(documents)
        starts, sizes = np.zeros_like(owners), np.minimum(documents[owners], capacity)
    else:
        pieces = -(-documents // capacity)
        owners = np.repeat(np.arange(len(documents)), pieces)
        starts = (np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * capacity
        sizes = np.minimum(documents[owners] - starts, capacity)
    longest_first = np.argsort(-sizes, kind="stable")
    rows, count = _best_fit(sizes[longest_first], capacity)
    by_row = np.argsort(rows, kind="stable")
    order = longest_first[by_row]
    return _plan(owners[order], starts[order], sizes[order], np.searchsorted(rows[by_row], np.arange(count + 1)))


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
    before = plan.lengths.cumsum(0) - plan.lengths  # packed tokens before each span
    shifts = offsets.to(torch.int64)[plan.documents] + plan.starts - before
    return torch.arange(int(plan.lengths.sum())) + shifts.repeat_interleave(plan.lengths)


class _Rows:
    """The rows started so far, by free space: a queue of ranges (first row, number of rows) for each space.

    The spaces that fit the current length are in a list of their own, the smallest last. Lengths only decrease, so a
    space that begins to fit is smaller than all that fitted before.
    """

    def __init__(self) -> None:
        self.queues: dict[int, deque[tuple[int, int]]] = {}
        self.fitting: list[int] = []
        self.others: list[int] = []  # a heap of the negated spaces that are too small

    def admit(self, length: int) -> None:
        """Move the spaces of at least this length to those that fit."""
        while self.others and -self.others[0] >= length:
            self.fitting.append(-heapq.heappop(self.others))

    def add(self, first: int, count: int, space: int, length: int) -> None:
        """Append a range of rows to the queue of its space."""
        if space == 0:
            return
        queue = self.queues.get(space)
        if queue is None:
            self.queues[space] = deque([(first, count)])
            if space >= length:
                self.fitting.append(space)
            else:
                heapq.heappush(self.others, -space)
        elif sum(queue[-1]) == first:
            queue[-1] = (queue[-1][0], queue[-1][1] + count)
        else:
            queue.append((first, count))

    def take(self, pieces: int, length: int) -> tuple[int, int, int]:
        """Fill the first rows of the best-fitting queue with pieces of one length, as many rows as the pieces need.

        Returns the first row, the number of rows and the number of pieces per row; each of these rows receives the
        same number of pieces: as many as fit, or all that are left.
        """
        space = self.fitting[-1]
        queue = self.queues[space]
        first, count = queue.popleft()
        taken = min(count, max(1, pieces // (space // length)))
        each = min(space // length, pieces)
        if taken < count:
            queue.appendleft((first + taken, count - taken))
        elif not queue:
            self.fitting.pop()
            del self.queues[space]
        self.add(first, taken, space - each * length, length)
        return first, taken, each


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each piece, and the number of rows; lengths are in decreasing order, from `capacity` to 1 at most."""
    rows, started = _Rows(), 0
    firsts, counts, pieces_each = [], [], []
    distinct, numbers = np.unique(-lengths, return_counts=True)
    for length, left in zip((-distinct).tolist(), numbers.tolist(), strict=True):
        rows.admit(length)
        while left:
            if not rows.fitting:
                needed = -(-left // (capacity // length))
                rows.add(started, needed, capacity, length)
                started += needed
            first, count, each = rows.take(left, length)
            firsts.append(first)
            counts.append(count)
            pieces_each.append(each)
            left -= count * each
    return _spread(np.array(firsts, np.int64), np.array(counts, np.int64), np.array(pieces_each, np.int64)), started


def _spread(firsts: np.ndarray, counts: np.ndarray, each: np.ndarray) -> np.ndarray:
    """The row of each piece. Step i puts each[i] pieces into each of the counts[i] rows from firsts[i]."""
    pieces = counts * each
    index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.repeat(firsts, pieces) + index // np.repeat(each, pieces)


def _wrapped(documents: np.ndarray, capacity: int) -> PackingPlan:
    ends = np.cumsum(documents)
    total = int(ends[-1]) if len(ends) else 0
    row_starts = np.arange(0, total, capacity)
    cuts = np.sort(np.concatenate([ends, row_starts]), kind="stable")  # merges the two sorted arrays
    begins = cuts[:-1][np.diff(cuts) > 0]
    owners = np.searchsorted(ends, begins, side="right")
    starts = begins - (ends - documents)[owners]
    sizes = np.diff(begins, append=total)
    return _plan(owners, starts, sizes, np.append(np.searchsorted(begins, row_starts), len(begins)))


def _plan(owners: np.ndarray, starts: np.ndarray, sizes: np.ndarray, offsets: np.ndarray) -> PackingPlan:
    return PackingPlan(*(torch.from_numpy(part.astype(np.int64)) for part in (owners, starts, sizes, offsets)))

"""Packing: documents of equal length together, numpy for the spans.

Best fit decreasing takes equal lengths one after the other, and then a row with free space f takes f // length of them
before any other row gets one: its own rest is the smallest space that still suffices. So one step fills a whole range
of rows alike, and each keeps less than half of its free space: at most log2(capacity) steps a range. Each different
length adds at most three ranges.
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
    """Lay documents into rows of at most `capacity` tokens.

    With "bfd" a document longer than a row loses its end; with "bfd_split" it is first cut into pieces of `capacity`
    tokens and a shorter last one; both take the longest piece first, the earlier one of two alike, and put it into the
    row with the least free space that suffices: of two alike, the one that has had this free space for longer. With
    "wrapped" the documents are laid one after the other in their own order and cut wherever a row is full.

    Args:
        lengths: tokens of each document, whole numbers from 0, [documents] if a tensor (int32 or int64). Documents
            without tokens are left out.
        capacity: tokens of a row, at least 1.
        strategy: "bfd", "bfd_split" or "wrapped".

    Returns:
        The plan: rows in the order in which they were begun, spans within a row in the order in which they were laid.

    Raises:
        ValueError: a negative length, a capacity below 1, an unknown strategy, or lengths that are not [documents].
        TypeError: lengths or capacity are not whole numbers.
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
    """Where each token of the packed rows comes from: packed = flat[packed_indices(plan, offsets)] for any column.

    Args:
        plan: of the same documents.
        offsets: [documents + 1] int32 or int64, the first token of each document in the flat column, then its size.

    Returns:
        [tokens in the plan] int64, row after row.

    Raises:
        ValueError: offsets is not one-dimensional, or the plan takes tokens that a document has not.
        TypeError: offsets is not int32 or int64.
    """
    batch_checks.plan_fits(plan, offsets)
    before = plan.lengths.cumsum(0) - plan.lengths  # packed tokens before each span
    shifts = offsets.to(torch.int64)[plan.documents] + plan.starts - before
    return torch.arange(int(plan.lengths.sum())) + shifts.repeat_interleave(plan.lengths)


class _Rows:
    """Rows that have been begun, by free space: for each space a queue of ranges (first row, number of rows).

    The spaces that suffice for the length at hand are kept apart, the smallest last. Lengths only fall, so whatever
    space comes to suffice is smaller than all that sufficed before.
    """

    def __init__(self) -> None:
        self.queues: dict[int, deque[tuple[int, int]]] = {}
        self.sufficing: list[int] = []
        self.others: list[int] = []  # a heap of their negatives

    def admit(self, length: int) -> None:
        """From now on the spaces from this length suffice."""
        while self.others and -self.others[0] >= length:
            self.sufficing.append(-heapq.heappop(self.others))

    def add(self, first: int, count: int, space: int, length: int) -> None:
        """Put a range of rows at the end of the queue of its space."""
        if space == 0:
            return
        queue = self.queues.get(space)
        if queue is None:
            self.queues[space] = deque([(first, count)])
            if space >= length:
                self.sufficing.append(space)
            else:
                heapq.heappush(self.others, -space)
        elif sum(queue[-1]) == first:
            queue[-1] = (queue[-1][0], queue[-1][1] + count)
        else:
            queue.append((first, count))

    def take(self, pieces: int, length: int) -> tuple[int, int, int]:
        """As many rows at the head of the best queue as so many pieces need: first row, rows, pieces that a row takes.

        The pieces are taken off their space; none of them may be left over in a row that is not full.
        """
        space = self.sufficing[-1]
        queue = self.queues[space]
        first, count = queue.popleft()
        taken = min(count, max(1, pieces // (space // length)))
        each = min(space // length, pieces)
        if taken < count:
            queue.appendleft((first + taken, count - taken))
        elif not queue:
            self.sufficing.pop()
            del self.queues[space]
        self.add(first, taken, space - each * length, length)
        return first, taken, each


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each piece, and the number of rows; lengths fall, from the capacity at most to 1."""
    rows, begun = _Rows(), 0
    firsts, counts, pieces_each = [], [], []
    kinds, numbers = np.unique(-lengths, return_counts=True)
    for length, left in zip((-kinds).tolist(), numbers.tolist(), strict=True):
        rows.admit(length)
        while left:
            if not rows.sufficing:
                needed = -(-left // (capacity // length))
                rows.add(begun, needed, capacity, length)
                begun += needed
            first, count, each = rows.take(left, length)
            firsts.append(first)
            counts.append(count)
            pieces_each.append(each)
            left -= count * each
    return _spread(np.array(firsts, np.int64), np.array(counts, np.int64), np.array(pieces_each, np.int64)), begun


def _spread(firsts: np.ndarray, counts: np.ndarray, each: np.ndarray) -> np.ndarray:
    """The row of each piece: steps one after the other, in each step count rows from the first, in each row so many."""
    pieces = counts * each
    index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.repeat(firsts, pieces) + index // np.repeat(each, pieces)


def _wrapped(documents: np.ndarray, capacity: int) -> PackingPlan:
    ends = np.cumsum(documents)
    total = int(ends[-1]) if len(ends) else 0
    row_starts = np.arange(0, total, capacity)
    cuts = np.sort(np.concatenate([ends, row_starts]), kind="stable")  # which merges what is sorted already
    begins = cuts[:-1][np.diff(cuts) > 0]
    owners = np.searchsorted(ends, begins, side="right")
    starts = begins - (ends - documents)[owners]
    sizes = np.diff(begins, append=total)
    return _plan(owners, starts, sizes, np.append(np.searchsorted(begins, row_starts), len(begins)))


def _plan(owners: np.ndarray, starts: np.ndarray, sizes: np.ndarray, offsets: np.ndarray) -> PackingPlan:
    return PackingPlan(*(torch.from_numpy(part.astype(np.int64)) for part in (owners, starts, sizes, offsets)))

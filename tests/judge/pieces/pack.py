"""Wrong and right implementations of pack."""

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from tests.judge.pieces import Collected
from unsloth_ref import batch_checks, checks, training
from unsloth_ref.types import PackingPlan

collected = Collected()
Row = list[tuple[int, int, int]]


def numbers(lengths: Sequence[int] | Tensor, capacity: int, strategy: str) -> list[int]:
    """Check the arguments, and return the lengths as a list."""
    batch_checks.at_least_one("capacity", capacity)
    checks.one_of("strategy", strategy, batch_checks.STRATEGIES)
    return batch_checks.lengths_tensor(lengths).tolist()


def planned(rows: list[Row]) -> PackingPlan:
    """Convert rows of (document, start, length) to a plan."""
    spans = [span for row in rows for span in row]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return PackingPlan(*(torch.tensor([span[i] for span in spans], dtype=torch.int64) for i in range(3)), offsets)


def rows_of(plan: PackingPlan) -> list[Row]:
    """Convert a plan to rows of (document, start, length)."""
    spans = list(zip(plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    return [spans[int(a) : int(b)] for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]


def pieces(lengths: list[int], capacity: int, strategy: str) -> Row:
    """The pieces of documents that best fit packs."""
    if strategy == "bfd":
        return [(document, 0, min(length, capacity)) for document, length in enumerate(lengths) if length]
    return [
        (document, start, min(capacity, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, capacity)
    ]


def laid(found: Row, capacity: int, choose: Any) -> PackingPlan:
    """Add each piece to the row that choose returns, given the free space of each row that the piece fits into."""
    rows: list[Row] = []
    free: dict[int, int] = {}
    for piece in found:
        fitting = {row: space for row, space in free.items() if space >= piece[2]}
        row = choose(fitting) if fitting else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        space = free.pop(row, capacity) - piece[2]
        free[row] = space  # inserted last: rows are in the order in which they reached their space
    return planned(rows)


def longest_first(found: Row) -> Row:
    """Sort the pieces in decreasing order of length."""
    return sorted(found, key=lambda piece: -piece[2])


def best(fitting: dict[int, int]) -> int:
    """The row with the least space; of equal rows, the one that reached it first."""
    return min(fitting, key=lambda row: fitting[row])


@collected.passes("pack")
def by_dictionary(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Keeps rows in a dictionary, in the order in which they reached their space."""
    found = numbers(lengths, capacity, strategy)
    if strategy == "wrapped":
        return training.pack(lengths, capacity, strategy="wrapped")
    return laid(longest_first(pieces(found, capacity, strategy)), capacity, best)


@collected.passes("pack")
def by_bisection(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Keeps free spaces in a sorted list."""
    found = numbers(lengths, capacity, strategy)
    if strategy == "wrapped":
        return training.pack(lengths, capacity, strategy="wrapped")
    rows: list[Row] = []
    free: list[tuple[int, int, int]] = []  # space, since, row
    for time, piece in enumerate(longest_first(pieces(found, capacity, strategy))):
        place = bisect.bisect_left(free, (piece[2], -1, -1))
        space, _, row = free.pop(place) if place < len(free) else (capacity, 0, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        bisect.insort(free, (space - piece[2], time, row))
    return planned(rows)


@collected.passes("pack")
def by_trl(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Uses TRL's packing of one batch, of tokens that encode where they come from."""
    from trl.data_utils import _pack_bfd  # takes seconds, and no other backend of this file needs it

    found = numbers(lengths, capacity, strategy)
    if strategy == "wrapped" or not any(found) or capacity > 1000:  # millions of tokens
        return training.pack(lengths, capacity, strategy=strategy)
    tokens = [[10_000 * document + token for token in range(length)] for document, length in enumerate(found)]
    table = pa.table({"input_ids": pa.array(tokens, pa.list_(pa.int64()))})
    packed = _pack_bfd(table, capacity, "split" if strategy == "bfd_split" else "truncate").to_pylist()
    rows = []
    for row in packed:
        ends = torch.tensor([0, *row["seq_lengths"]]).cumsum(0).tolist()
        rows.append(
            [(*divmod(row["input_ids"][e], 10_000), n) for e, n in zip(ends[:-1], row["seq_lengths"], strict=True)]
        )
    return planned(rows)


@collected.fails("pack", "equal")
def first_fit(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Chooses the first row that a piece fits into."""
    found = numbers(lengths, capacity, strategy)
    if strategy == "wrapped":
        return training.pack(lengths, capacity, strategy="wrapped")
    return laid(longest_first(pieces(found, capacity, strategy)), capacity, min)


@collected.fails("pack", "no_more_rows")
def next_fit(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Considers only the last row."""
    found = numbers(lengths, capacity, strategy)
    rows: list[Row] = []
    for piece in longest_first(pieces(found, capacity, strategy)):
        if not rows or sum(span[2] for span in rows[-1]) + piece[2] > capacity:
            rows.append([])
        rows[-1].append(piece)
    return training.pack(lengths, capacity, strategy="wrapped") if strategy == "wrapped" else planned(rows)


@collected.fails("pack", "equal")
def last_come_first_served(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Of equal rows, chooses the one that reached its space last."""
    found = numbers(lengths, capacity, strategy)
    if strategy == "wrapped":
        return training.pack(lengths, capacity, strategy="wrapped")
    ordered = longest_first(pieces(found, capacity, strategy))
    return laid(ordered, capacity, lambda fitting: best(dict(reversed(fitting.items()))))


@collected.fails("pack", "equal")
def later_documents_first(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Sorts unstably: of equally long documents, the later one is first."""
    found = numbers(lengths, capacity, strategy)
    if strategy == "wrapped":
        return training.pack(lengths, capacity, strategy="wrapped")
    return laid(longest_first(pieces(found, capacity, strategy)[::-1]), capacity, best)


@collected.fails("pack", "equal")
def lengths_in_16_bits(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Sorts lengths as numbers of 16 bits, of which large ones are negative."""
    found = numbers(lengths, capacity, strategy)
    if strategy == "wrapped":
        return training.pack(lengths, capacity, strategy="wrapped")
    ordered = sorted(pieces(found, capacity, strategy), key=lambda piece: -((piece[2] + 2**15) % 2**16))
    return laid(ordered, capacity, best)


@collected.fails("pack", "order")
def not_decreasing(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Does not sort the documents by length."""
    found = numbers(lengths, capacity, strategy)
    if strategy == "wrapped":
        return training.pack(lengths, capacity, strategy="wrapped")
    return laid(pieces(found, capacity, strategy), capacity, best)


@collected.fails("pack", "capacity")
def one_token_too_many(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Fills rows up to capacity + 1, as `<=` in place of `<` does."""
    return training.pack(lengths, capacity + (capacity > 1), strategy=strategy)


@collected.fails("pack", "tokens_kept")
def long_documents_dropped(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Drops documents longer than a row."""
    kept = [length if length <= capacity else 0 for length in numbers(lengths, capacity, strategy)]
    return training.pack(kept, capacity, strategy=strategy)


@collected.fails("pack", "tokens_kept")
def always_truncated(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Treats bfd_split as bfd, which truncates long documents."""
    return training.pack(lengths, capacity, strategy="bfd" if strategy == "bfd_split" else strategy)


@collected.fails("pack", "whole_documents", "tokens_kept")
def always_wrapped(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Splits documents wherever a row is full, with every strategy."""
    return training.pack(lengths, capacity, strategy="wrapped")


@collected.fails("pack", "tokens_kept")
def short_row_dropped(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """With "wrapped", drops the last row unless it is full."""
    rows = rows_of(training.pack(lengths, capacity, strategy=strategy))
    if strategy == "wrapped" and rows and sum(span[2] for span in rows[-1]) < capacity:
        rows.pop()
    return planned(rows)


@collected.fails("pack", "tokens_kept")
def buffer_read_again(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Each batch of four documents starts from document 0, as if the offset of a slice were ignored."""
    plan = training.pack(lengths, capacity, strategy=strategy)
    return replace(plan, documents=plan.documents % 4) if strategy == "wrapped" else plan


@collected.fails("pack", "no_more_rows")
def packed_by_batches(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Packs each batch of eight documents by itself."""
    found = numbers(lengths, capacity, strategy)
    rows = []
    for first in range(0, len(found), 8):
        part = rows_of(training.pack(found[first : first + 8], capacity, strategy=strategy))
        rows += [[(document + first, start, length) for document, start, length in row] for row in part]
    return planned(rows)


@collected.fails("pack", "structure")
def short_integers(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Offsets are int32."""
    plan = training.pack(lengths, capacity, strategy=strategy)
    return replace(plan, offsets=plan.offsets.int())


@collected.fails("pack", "structure")
def empty_documents_kept(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Keeps spans without tokens, which later merge the positions of their neighbours."""
    found = numbers(lengths, capacity, strategy)
    rows = rows_of(training.pack(lengths, capacity, strategy=strategy))
    if rows:
        rows[-1] += [(document, 0, 0) for document, length in enumerate(found) if not length]
    return planned(rows)


@collected.fails("pack", "equal")
def last_row_first(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Returns the rows in reverse order."""
    return planned(rows_of(training.pack(lengths, capacity, strategy=strategy))[::-1])


@collected.fails("pack", "inputs_untouched")
def sorts_the_lengths(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Sorts the lengths in place."""
    plan = training.pack(lengths, capacity, strategy=strategy)
    lengths[:] = torch.sort(lengths).values if isinstance(lengths, Tensor) else sorted(lengths)
    return plan


@collected.fails("pack", "error_parity")
def strategies_unread(lengths: Any, capacity: int, *, strategy: str = "bfd") -> PackingPlan:
    """Any unknown strategy is bfd."""
    return training.pack(lengths, capacity, strategy=strategy if strategy in batch_checks.STRATEGIES else "bfd")


@collected.fails("pack", "signature_parity", contract=False)
def another_default(lengths: Any, capacity: int, *, strategy: str = "bfd_split") -> PackingPlan:
    """Splits by default."""
    return training.pack(lengths, capacity, strategy=strategy)

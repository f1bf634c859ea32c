"""The plan of packed rows."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st

from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import Arguments, equal, inputs_untouched
from conformance.tolerances.gates import Failure
from unsloth_ref.batch_checks import STRATEGIES
from unsloth_ref.checks import counted
from unsloth_ref.types import PackingPlan

DOCUMENTS = 30  # the reference searches every row for every document


@dataclass(frozen=True)
class PackCase(PieceCase):
    """Documents to pack: their lengths, the capacity of a row, and the strategy."""

    lengths: tuple[int, ...]
    capacity: int
    strategy: str = "bfd"


def draw(elements: int) -> st.SearchStrategy[PackCase]:
    """Draw a capacity, up to more than 16 bits hold, and lengths around its halves and multiples."""
    return _drawn(elements, (17, 64, 513, 70_000))


def draw_short(elements: int) -> st.SearchStrategy[PackCase]:
    """Draw such a case of few tokens."""
    return _drawn(elements, (17, 64, 513))


def _drawn(elements: int, capacities: Sequence[int]) -> st.SearchStrategy[PackCase]:
    @st.composite
    def case(pick: st.DrawFn) -> PackCase:
        capacity = pick(st.one_of(st.integers(1, 16), st.sampled_from(capacities)))
        edges = [0, 1, capacity // 3, capacity // 2, capacity // 2 + 1, capacity - 1, capacity, capacity + 1]
        any_length = st.one_of(st.integers(0, capacity), st.sampled_from([*edges, 2 * capacity, 3 * capacity + 1]))
        small = st.integers(1, max(1, 2 * capacity // 5))  # for which the choice of the row matters
        most = max(1, min(DOCUMENTS, elements))
        crowd = st.lists(st.one_of(small, any_length), min_size=most // 2, max_size=most)
        lengths = pick(st.one_of(st.lists(any_length, max_size=8), crowd))
        return PackCase(tuple(lengths), capacity, pick(st.sampled_from(STRATEGIES)))

    return case()


def arguments(case: PackCase, device: str) -> Arguments:
    """Lengths are a tensor if their number is odd, and a list if it is even: both are valid."""
    lengths = torch.tensor(case.lengths) if len(case.lengths) % 2 else list(case.lengths)
    return (lengths, case.capacity), {"strategy": case.strategy}


def _planned(trial: PieceTrial, case: PackCase) -> PackingPlan:
    positional, keywords = arguments(case, trial.device)
    return trial.function(*positional, **keywords)


def _rows(plan: PackingPlan) -> list[list[tuple[int, int, int]]]:
    spans = list(zip(plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    offsets = plan.offsets.tolist()
    return [spans[first:last] for first, last in pairwise(offsets)]


def structure(trial: PieceTrial, case: PackCase) -> None:
    """The plan has int64 CPU tensors, offsets go from 0 to the number of spans, and no row or span is empty."""
    plan = _planned(trial, case)
    for name in ("documents", "starts", "lengths", "offsets"):
        part = getattr(plan, name)
        if part.dtype != torch.int64 or part.ndim != 1 or part.device.type != "cpu":
            raise Failure(f"{name} is {part.dtype} {list(part.shape)} on {part.device}, should be int64 [...] on cpu")
    offsets = plan.offsets.tolist()
    if offsets[:1] != [0] or offsets[-1] != len(plan.documents):
        raise Failure(f"offsets are {offsets}, should go from 0 to {len(plan.documents)}, the number of spans")
    if any(later <= earlier for earlier, later in pairwise(offsets)):
        raise Failure(f"offsets are {offsets}: a row is empty")
    if (plan.lengths < 1).any():
        raise Failure(f"lengths are {plan.lengths.tolist()}: a span is empty")


def capacity(trial: PieceTrial, case: PackCase) -> None:
    """No row has more tokens than the capacity."""
    for index, row in enumerate(_rows(_planned(trial, case))):
        held = sum(length for _, _, length in row)
        if held > case.capacity:
            raise Failure(f"row {index} has {held} tokens, the capacity is {case.capacity}: {row}")


def tokens_kept(trial: PieceTrial, case: PackCase) -> None:
    """Each token is in exactly one span; with "bfd", tokens of a document beyond the capacity are in none."""
    spans = defaultdict(list)
    for row in _rows(_planned(trial, case)):
        for document, start, length in row:
            spans[document].append((start, length))
    for document, length in enumerate(case.lengths):
        wanted = min(length, case.capacity) if case.strategy == "bfd" else length
        end = 0
        for start, taken in sorted(spans.pop(document, [])):
            if start != end:
                raise Failure(f"document {document} of {length} tokens: tokens {min(start, end)} to {max(start, end)}")
            end = start + taken
        if end != wanted:
            raise Failure(f"document {document} of {length} tokens: {end} are kept, should be {wanted}")
    if spans:
        raise Failure(f"documents {sorted(spans)} do not exist; there are {len(case.lengths)}")


def order(trial: PieceTrial, case: PackCase) -> None:
    """The spans of a row are in decreasing order of length; with "wrapped" all tokens keep their order."""
    rows = _rows(_planned(trial, case))
    for index, row in enumerate(rows):
        if case.strategy != "wrapped" and [s[2] for s in row] != sorted((s[2] for s in row), reverse=True):
            raise Failure(f"row {index} is not in decreasing order of length: {row}")
    laid = [span[:2] for row in rows for span in row]
    if case.strategy == "wrapped" and laid != sorted(laid):
        raise Failure(f"documents are out of order: {laid}")


def whole_documents(trial: PieceTrial, case: PackCase) -> None:
    """With best fit, a document that fits into a row is not split."""
    if case.strategy == "wrapped":
        return
    for row in _rows(_planned(trial, case)):
        for document, start, length in row:
            if case.lengths[document] <= case.capacity and (start, length) != (0, case.lengths[document]):
                raise Failure(f"document {document} of {case.lengths[document]} tokens is split: {length} from {start}")


def no_more_rows(trial: PieceTrial, case: PackCase) -> None:
    """There are no more rows than best fit decreasing needs; with "wrapped", all rows but the last are full."""
    rows = len(_planned(trial, case).offsets) - 1
    allowed = -(-sum(case.lengths) // case.capacity) if case.strategy == "wrapped" else _best_fit_rows(case)
    if rows > allowed:
        raise Failure(f"{counted(rows, 'row')}, should be at most {allowed}")


def _best_fit_rows(case: PackCase) -> int:
    """The number of rows of best fit decreasing, from the free spaces alone."""
    full = sum(length // case.capacity for length in case.lengths) if case.strategy == "bfd_split" else 0
    parts = [n % case.capacity if case.strategy == "bfd_split" else min(n, case.capacity) for n in case.lengths]
    free: list[int] = []
    for length in sorted(filter(None, parts), reverse=True):
        space = min((space for space in free if space >= length), default=None)
        if space is not None:
            free.remove(space)
        free.append((case.capacity if space is None else space) - length)
    return full + len(free)


def _call(*positional: object, **keywords: object) -> Arguments:
    return positional, keywords


piece = Piece(
    op="pack",
    draw=draw,
    checks=(
        structure,
        capacity,
        tokens_kept,
        order,
        whole_documents,
        no_more_rows,
        equal(arguments),
        inputs_untouched(arguments),
    ),
    simplest=PackCase((3, 2), 4),
    mistakes=(
        Mistake("a capacity of 0", lambda: _call([3], 0), ValueError, "capacity"),
        Mistake("a capacity that is not an integer", lambda: _call([3], 2.5), TypeError, "capacity"),
        Mistake("a negative length", lambda: _call([3, -1], 4), ValueError, "lengths"),
        Mistake("lengths that are not integers", lambda: _call([3.0, 1.5], 4), TypeError, "lengths"),
        Mistake("lengths in two dimensions", lambda: _call(torch.ones(2, 2).long(), 4), ValueError, "lengths"),
        Mistake("an unknown strategy", lambda: _call([3], 4, strategy="first"), ValueError, "strategy"),
    ),
)

"""Plans of packed rows."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st

from conformance.gates import Failure
from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import Arguments, equal, inputs_untouched
from unsloth_ref.batch_checks import STRATEGIES
from unsloth_ref.types import PackingPlan

DOCUMENTS = 30  # the reference looks at every row for every document


@dataclass(frozen=True)
class PackCase(PieceCase):
    """Documents to pack."""

    lengths: tuple[int, ...]
    capacity: int
    strategy: str = "bfd"


def draw(elements: int) -> st.SearchStrategy[PackCase]:
    """A capacity, and lengths around its halves and multiples."""

    @st.composite
    def case(pick: st.DrawFn) -> PackCase:
        capacity = pick(st.one_of(st.integers(1, 16), st.sampled_from([17, 31, 64, 100, 513])))
        edges = [0, 1, capacity // 3, capacity // 2, capacity // 2 + 1, capacity - 1, capacity, capacity + 1]
        any_length = st.one_of(st.integers(0, capacity), st.sampled_from([*edges, 2 * capacity, 3 * capacity + 1]))
        small = st.integers(1, max(1, 2 * capacity // 5))  # where the choice of a row matters
        most = max(1, min(DOCUMENTS, elements))
        crowd = st.lists(st.one_of(small, any_length), min_size=most // 2, max_size=most)
        lengths = pick(st.one_of(st.lists(any_length, max_size=8), crowd))
        return PackCase(tuple(lengths), capacity, pick(st.sampled_from(STRATEGIES)))

    return case()


def arguments(case: PackCase, device: str) -> Arguments:
    """A tensor for every other number of documents: both are taken."""
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
    """Int64 tensors on the CPU; offsets from 0 to the number of spans; no row and no span is empty."""
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
    """No row holds more tokens than the capacity."""
    for index, row in enumerate(_rows(_planned(trial, case))):
        held = sum(length for _, _, length in row)
        if held > case.capacity:
            raise Failure(f"row {index} holds {held} tokens, the capacity is {case.capacity}: {row}")


def tokens_kept(trial: PieceTrial, case: PackCase) -> None:
    """Each token is in one span, from the document's first on; with "bfd" those behind the capacity are in none."""
    spans = defaultdict(list)
    for row in _rows(_planned(trial, case)):
        for document, start, length in row:
            spans[document].append((start, length))
    for document, length in enumerate(case.lengths):
        kept = min(length, case.capacity) if case.strategy == "bfd" else length
        end = 0
        for start, taken in sorted(spans.pop(document, [])):
            if start != end:
                raise Failure(f"document {document} of {length} tokens: tokens {min(start, end)} to {max(start, end)}")
            end = start + taken
        if end != kept:
            raise Failure(f"document {document} of {length} tokens: {end} are kept, should be {kept}")
    if spans:
        raise Failure(f"documents {sorted(spans)} do not exist; there are {len(case.lengths)}")


def order(trial: PieceTrial, case: PackCase) -> None:
    """Within a row the longest span comes first; with "wrapped" all tokens stay in their order."""
    rows = _rows(_planned(trial, case))
    for index, row in enumerate(rows):
        if case.strategy != "wrapped" and [s[2] for s in row] != sorted((s[2] for s in row), reverse=True):
            raise Failure(f"row {index} is not in falling order of length: {row}")
    laid = [span[:2] for row in rows for span in row]
    if case.strategy == "wrapped" and laid != sorted(laid):
        raise Failure(f"documents are out of order: {laid}")


def whole_documents(trial: PieceTrial, case: PackCase) -> None:
    """With best fit a document that a row can hold is not cut."""
    if case.strategy == "wrapped":
        return
    for row in _rows(_planned(trial, case)):
        for document, start, length in row:
            if case.lengths[document] <= case.capacity and (start, length) != (0, case.lengths[document]):
                raise Failure(f"document {document} of {case.lengths[document]} tokens is cut: {length} from {start}")


def no_more_rows(trial: PieceTrial, case: PackCase) -> None:
    """No more rows than best fit decreasing needs; with "wrapped" no more than full rows and one."""
    rows = len(_planned(trial, case).offsets) - 1
    allowed = -(-sum(case.lengths) // case.capacity) if case.strategy == "wrapped" else _best_fit_rows(case)
    if rows > allowed:
        raise Failure(f"{rows} rows, should be at most {allowed}")


def _best_fit_rows(case: PackCase) -> int:
    """Counted by free space alone."""
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
    laws=(
        structure,
        capacity,
        tokens_kept,
        order,
        whole_documents,
        no_more_rows,
        equal(arguments),
        inputs_untouched(arguments),
    ),
    plain=PackCase((3, 2), 4),
    mistakes=(
        Mistake("a capacity of 0", lambda: _call([3], 0), ValueError, "capacity"),
        Mistake("a capacity that is no whole number", lambda: _call([3], 2.5), TypeError, "capacity"),
        Mistake("a negative length", lambda: _call([3, -1], 4), ValueError, "lengths"),
        Mistake("lengths that are no whole numbers", lambda: _call([3.0, 1.5], 4), TypeError, "lengths"),
        Mistake("lengths in two dimensions", lambda: _call(torch.ones(2, 2).long(), 4), ValueError, "lengths"),
        Mistake("an unknown strategy", lambda: _call([3], 4, strategy="first"), ValueError, "strategy"),
    ),
)

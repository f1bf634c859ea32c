"""The targets of all microbatches of a step."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.gates import Failure
from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import Arguments, batches, equal, inputs_untouched, labels


@dataclass(frozen=True)
class WindowCase(PieceCase):
    """Microbatches: the lengths of the rows of each."""

    window: tuple[tuple[int, ...], ...]
    seed: int = 0
    iterator: bool = False


def draw(elements: int) -> st.SearchStrategy[WindowCase]:
    """A few microbatches of any sizes."""
    window = st.lists(batches(), max_size=4).map(tuple)
    return st.builds(WindowCase, window=window, seed=st.integers(0, 3), iterator=st.booleans())


def microbatches(case: WindowCase, device: str) -> list[Tensor]:
    """Their labels."""
    return [labels(rows, 5, case.seed + index, device) for index, rows in enumerate(case.window)]


def count(trial: PieceTrial, case: WindowCase) -> None:
    """Labels after the first of each row that are not ignored, as a 0-dim int64, of a list or an iterator."""
    found = microbatches(case, trial.device)
    wanted = sum(label != -100 for batch in found for row in batch.tolist() for label in row[1:])
    seen = trial.function(iter(found) if case.iterator else found)
    if not isinstance(seen, Tensor) or seen.dtype != torch.int64 or seen.ndim or int(seen) != wanted:
        raise Failure(f"counted {seen!r}, should be a 0-dim int64 tensor of {wanted}")


def partition(trial: PieceTrial, case: WindowCase) -> None:
    """However rows are dealt out to microbatches and ranks, the counts add up to the same."""
    found = microbatches(case, trial.device)
    whole = int(trial.function(found))
    rows = sum(int(trial.function([row[None]])) for batch in found for row in batch)
    if rows != whole:
        raise Failure(f"row by row {rows} targets, together {whole}")


def arguments(case: WindowCase, device: str) -> Arguments:
    """As a list."""
    return (microbatches(case, device),), {"ignore_index": case.seed - 1}


piece = Piece(
    op="count_targets",
    draw=draw,
    laws=(count, partition, equal(arguments), inputs_untouched(arguments)),
    plain=WindowCase(((3,),)),
    mistakes=(
        Mistake("a row in place of a batch", lambda: (([torch.ones(3).long()],), {}), ValueError, "labels"),
        Mistake("float labels", lambda: (([torch.ones(1, 3)],), {}), TypeError, "labels"),
    ),
)

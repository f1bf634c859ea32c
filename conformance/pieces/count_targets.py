"""The number of targets of all microbatches of a step."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from conformance.piece import Mistake, Piece, PieceCase, PieceTrial
from conformance.pieces._shared import Arguments, batches, equal, inputs_untouched, labels
from conformance.tolerances.gates import Failure
from unsloth_ref.types import IGNORE_INDEX


@dataclass(frozen=True)
class WindowCase(PieceCase):
    """The lengths of the rows of each microbatch."""

    window: tuple[tuple[int, ...], ...]
    seed: int = 0
    iterator: bool = False


def draw(elements: int) -> st.SearchStrategy[WindowCase]:
    """Draw a few microbatches of different sizes."""
    window = st.lists(batches(), max_size=4).map(tuple)
    return st.builds(WindowCase, window=window, seed=st.integers(0, 3), iterator=st.booleans())


def microbatches(case: WindowCase, device: str) -> list[Tensor]:
    """The labels of the microbatches; of odd seeds in int32."""
    dtype = torch.int32 if case.seed % 2 else torch.int64
    return [labels(rows, 5, case.seed + index, device).to(dtype) for index, rows in enumerate(case.window)]


def count(trial: PieceTrial, case: WindowCase) -> None:
    """The result is a 0-dim int64: labels after the first of each row that are not ignored; a list or an iterator."""
    found = microbatches(case, trial.device)
    wanted = sum(label != IGNORE_INDEX for batch in found for row in batch.tolist() for label in row[1:])
    seen = trial.function(iter(found) if case.iterator else found)
    if not isinstance(seen, Tensor) or seen.dtype != torch.int64 or seen.ndim or int(seen) != wanted:
        raise Failure(f"counted {seen!r}, should be a 0-dim int64 tensor of {wanted}")


def partition(trial: PieceTrial, case: WindowCase) -> None:
    """The counts sum to the same total, however rows are distributed over microbatches and ranks."""
    found = microbatches(case, trial.device)
    whole = int(trial.function(found))
    rows = sum(int(trial.function([row[None]])) for batch in found for row in batch)
    if rows != whole:
        raise Failure(f"counted {rows} targets row by row, {whole} in one call")


def arguments(case: WindowCase, device: str) -> Arguments:
    """The microbatches as a list."""
    return (microbatches(case, device),), {"ignore_index": case.seed - 1}


piece = Piece(
    op="count_targets",
    draw=draw,
    checks=(count, partition, equal(arguments), inputs_untouched(arguments)),
    simplest=WindowCase(((3,),)),
    mistakes=(
        Mistake("labels of one dimension", lambda: (([torch.ones(3).long()],), {}), ValueError, "labels"),
        Mistake("float labels", lambda: (([torch.ones(1, 3)],), {}), TypeError, "labels"),
    ),
)

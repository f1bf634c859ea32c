"""Labels moved to where they are foretold."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from conformance.piece import Mistake, Piece, PieceCase
from conformance.pieces._shared import Arguments, equal, inputs_untouched, labels


@dataclass(frozen=True)
class LabelsCase(PieceCase):
    """One batch of labels.

    Attributes:
        rows: how many.
        length: tokens of a row.
        ignore_index: the label that does not count.
        int32: whether labels are int32, not int64.
        transposed: whether they lie column by column.
        seed: seeds the labels.
    """

    rows: int
    length: int
    ignore_index: int = -100
    int32: bool = False
    transposed: bool = False
    seed: int = 0


def draw(elements: int) -> st.SearchStrategy[LabelsCase]:
    """Few rows, down to none."""
    return st.builds(
        LabelsCase,
        rows=st.integers(0, 4),
        length=st.integers(0, 20),
        ignore_index=st.sampled_from([-100, 0, 2]),
        int32=st.booleans(),
        transposed=st.booleans(),
        seed=st.integers(0, 3),
    )


def batch(case: LabelsCase, device: str) -> torch.Tensor:
    """The labels."""
    found = labels((case.length,) * case.rows, 5, case.seed, device, case.length)
    found = found.to(torch.int32 if case.int32 else torch.int64)
    return found.T.contiguous().T if case.transposed else found


def arguments(case: LabelsCase, device: str) -> Arguments:
    """The keyword only where it is no default."""
    return (batch(case, device),), {} if case.ignore_index == -100 else {"ignore_index": case.ignore_index}


piece = Piece(
    op="shift_labels",
    draw=draw,
    laws=(equal(arguments), inputs_untouched(arguments)),
    plain=LabelsCase(1, 3),
    mistakes=(
        Mistake("one row alone", lambda: ((torch.ones(3).long(),), {}), ValueError, "labels"),
        Mistake("float labels", lambda: ((torch.ones(1, 3),), {}), TypeError, "labels"),
    ),
)

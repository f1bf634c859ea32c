"""Labels shifted to the positions that predict them."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from conformance.piece import Mistake, Piece, PieceCase
from conformance.pieces._shared import Arguments, equal, inputs_untouched, labels
from unsloth_ref.types import IGNORE_INDEX


@dataclass(frozen=True)
class LabelsCase(PieceCase):
    """One batch of labels.

    Attributes:
        rows: the number of rows.
        length: the number of tokens of a row.
        ignore_index: the label of tokens that are not targets.
        int32: whether labels are int32 instead of int64.
        transposed: whether labels are column-major.
        seed: the seed of the labels.
    """

    rows: int
    length: int
    ignore_index: int = IGNORE_INDEX
    int32: bool = False
    transposed: bool = False
    seed: int = 0


def draw(elements: int) -> st.SearchStrategy[LabelsCase]:
    """Draw a few rows, or none."""
    return st.builds(
        LabelsCase,
        rows=st.integers(0, 4),
        length=st.integers(0, 20),
        ignore_index=st.sampled_from([IGNORE_INDEX, 0, 2]),
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
    """The keyword is passed only if it is not the default."""
    return (batch(case, device),), {} if case.ignore_index == IGNORE_INDEX else {"ignore_index": case.ignore_index}


piece = Piece(
    op="shift_labels",
    draw=draw,
    checks=(equal(arguments), inputs_untouched(arguments)),
    simplest=LabelsCase(1, 3),
    mistakes=(
        Mistake("labels of one dimension", lambda: ((torch.ones(3).long(),), {}), ValueError, "labels"),
        Mistake("float labels", lambda: ((torch.ones(1, 3),), {}), TypeError, "labels"),
    ),
)

"""The indices of packed tokens in a flat column."""

from itertools import accumulate

import torch

from conformance.piece import Mistake, Piece, PieceTrial
from conformance.pieces import pack
from conformance.pieces._shared import Arguments, equal, inputs_untouched
from conformance.pieces.pack import PackCase
from conformance.tolerances.gates import Failure
from unsloth_ref import training

FAR = 2**33  # tokens of a column before the first document


def arguments(case: PackCase, device: str) -> Arguments:
    """The plan of the reference, and offsets in int32 or int64, which are beyond 32 bits."""
    plan = training.pack(case.lengths, case.capacity, strategy=case.strategy)  # type: ignore[arg-type]
    dtype, first = (torch.int32, 0) if len(case.lengths) % 2 else (torch.int64, FAR)
    return (plan, torch.tensor([*accumulate(case.lengths, initial=first)], dtype=dtype)), {}


def rows_of_documents(trial: PieceTrial, case: PackCase) -> None:
    """Indexing the flat column gives the tokens of the spans of each row, in order."""
    (plan, offsets), _ = arguments(case, trial.device)
    flat = [(document, token) for document, length in enumerate(case.lengths) for token in range(length)]
    packed = [flat[index] for index in (trial.function(plan, offsets) - offsets[0]).tolist()]
    spans = zip(plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True)
    wanted = [(document, start + token) for document, start, length in spans for token in range(length)]
    if packed != wanted:
        raise Failure(f"packed tokens (document, token) are {packed}, should be {wanted}")


def _call(lengths: list[int], offsets: torch.Tensor) -> Arguments:
    return (training.pack(lengths, 4), offsets), {}


piece = Piece(
    op="packed_indices",
    draw=pack.draw_short,
    checks=(rows_of_documents, equal(arguments), inputs_untouched(arguments)),
    simplest=PackCase((3, 2), 4),
    mistakes=(
        Mistake("one document too few", lambda: _call([3, 2], torch.tensor([0, 3])), ValueError, "offsets"),
        Mistake(
            "a document shorter than in the plan", lambda: _call([3, 2], torch.tensor([0, 3, 4])), ValueError, "offsets"
        ),
        Mistake("offsets in two dimensions", lambda: _call([1], torch.tensor([[0, 1]])), ValueError, "offsets"),
    ),
)

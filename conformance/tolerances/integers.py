"""Where integers and booleans are compared: exactly, except where a rounding changes the reference's result."""

from torch import Tensor

from conformance.tolerances.gates import Failure


def judge_exact(
    name: str, y: Tensor, r: Tensor, p: Tensor, flips: Tensor, lowest: float, highest: float, distinct: bool
) -> None:
    """Compare integers and booleans: each must be that of the truth or of the peer.

    Where a rounding changes the reference's result (`flips`: a tie, a threshold), any value from `lowest` to `highest`
    is accepted. If `distinct`, none may occur twice in a row: of two tied columns top-k chooses each at most once.

    Raises:
        Failure: shape, dtype or an element differs, or a number occurs twice.
    """
    if y.shape != p.shape or y.dtype != p.dtype:
        seen, right = (f"{t.dtype} of shape {list(t.shape)}" for t in (y, p))
        raise Failure(f"gate G0: {name} is {seen}, should be {right}")
    wrong = (y != p) & (y != r)
    wrong &= ~flips | (y < lowest) | (y > highest)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise Failure(
            f"gate G0: {name} is {y[index].item()} at index {index}, should be {p[index].item()}\n"
            f"{int(wrong.sum())} of {wrong.numel()} elements differ from the reference"
        )
    if distinct and not all_distinct(y):
        index = tuple((y.sort(-1).values.diff() == 0).nonzero()[0].tolist())[:-1]
        raise Failure(f"gate G0: {name} has a number twice in row {index}, the reference never\n{y[index].tolist()}")


def all_distinct(r: Tensor) -> bool:
    """Whether no integer occurs twice in a row, as among the choices of top-k."""
    return r.ndim > 0 and r.shape[-1] > 1 and bool(r.sort(-1).values.diff().all())

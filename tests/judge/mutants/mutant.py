"""The description of a wrong kernel."""

from dataclasses import dataclass

from tests.judge.sources import Edit


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel.

    Attributes:
        edits: what is changed.
        properties: those that may find it; at least one of them must.
        dtype: the dtype in which they are checked.
        rare: whether random cases are not expected to show it, but those that cover what was explored.
        device: where it is wrong; None for everywhere.
    """

    edits: tuple[Edit, ...]
    properties: tuple[str, ...]
    dtype: str = "float32"
    rare: bool = False
    device: str | None = None


def one(old: str, new: str, *properties: str, dtype: str = "float32") -> Mutant:
    """A mutant with one edit."""
    return Mutant(((old, new),), properties, dtype)


# Without this guard, a derivative of the gradient is silently zero.
LYING = (
    "return tuple(None if r is None else Undifferentiable.apply(r, *grad_outputs, *saved) for r in results)",
    "return results",
    "double_backward",
)

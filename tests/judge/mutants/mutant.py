"""What a wrong kernel is made of."""

from dataclasses import dataclass

from tests.judge.sources import Edit


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel.

    Attributes:
        edits: what is changed.
        laws: properties that may find it, one of which must.
        dtype: in which to look.
    """

    edits: tuple[Edit, ...]
    laws: tuple[str, ...]
    dtype: str = "float32"


def one(old: str, new: str, *laws: str, dtype: str = "float32") -> Mutant:
    """A mutant of one edit."""
    return Mutant(((old, new),), laws, dtype)


# Without its guard, a derivative of the gradient is silently zero.
LYING = (
    "return tuple(None if r is None else Undifferentiable.apply(r, *grad_outputs, *saved) for r in results)",
    "return results",
    "double_backward",
)

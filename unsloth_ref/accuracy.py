"""How accurate must a result be? About as accurate as plain PyTorch, whatever the operation.

    y   the result        r   the truth: the reference in float64        p   the peer: the reference in the dtype of y

    ||y - r||     <= 1.5 max(||p - r||, floor)      if the elements are enough for a statistic
    max |y - r|   <= 2   max(max |p - r|, floor)

A floor is the error of a right computation that makes every rounding that it may, for the peer may make fewer. Its two
users derive it: gate G2 of the judge from the spec of an operation (conformance/gates.py), a shadowed call from what
the truth does when its inputs move (unsloth_fast/shadow.py). Here is also what both derive it from.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_FLOAT32 = 2.0**-24
ROUNDING_RMS = (8 * math.log(2)) ** -0.5  # 0.42: of a rounding to nearest, in units of u |x|
G2_ELEMENTS = 64  # fewer elements, or copies of fewer errors, are no statistic
G2_RMS, G2_MAX = 1.5, 2.0
G2_SAMPLE = 2**16  # elements among which distinct values are counted


def unit_roundoff(dtype: torch.dtype, truncates: bool = False) -> float:
    """Largest relative error of rounding to nearest; twice as large in bfloat16 if casts truncate."""
    return torch.finfo(dtype).eps / (1 if truncates and dtype == torch.bfloat16 else 2)


def float32_error(elements: int) -> float:
    """Largest relative error of float32 arithmetic on so many elements: 2 log2(n) 2^-24."""
    return 2 * max(1.0, math.log2(max(1, elements))) * UNIT_FLOAT32


@dataclass(frozen=True)
class Comparison:
    """One inequality of the two above.

    Attributes:
        which: "root mean square" or "largest".
        factor: 1.5 or 2.
        measured: the error of y: the norm, or the largest.
        peer: that of p.
        floor: the least that is allowed before the factor.
    """

    which: str
    factor: float
    measured: float
    peer: float
    floor: float

    @property
    def allowed(self) -> float:
        """The right-hand side."""
        return self.factor * max(self.peer, self.floor)

    @property
    def used(self) -> float:
        """Measured / allowed: the budget use."""
        if self.measured == 0:
            return 0.0
        return self.measured / self.allowed if self.allowed > 0 else math.inf


def against_peer(error: Tensor, peer_error: Tensor, floors: tuple[float, float]) -> tuple[Comparison, Comparison]:
    """Both inequalities.

    Args:
        error: y - r, float64, flat.
        peer_error: p - r, likewise.
        floors: of the norm and of the largest error.
    """
    rms, peer_rms = float(error.norm()), float(peer_error.norm())
    largest, peer_largest = float(error.abs().max()), float(peer_error.abs().max())
    return (
        Comparison("root mean square", G2_RMS, rms, peer_rms, floors[0]),
        Comparison("largest", G2_MAX, largest, peer_largest, floors[1]),
    )


def is_statistic(r: Tensor, error: Tensor) -> bool:
    """Whether the elements of a flat truth, and the errors of a result, are enough for a statistic."""
    square = r.square().sum()
    # The effective number of elements: a norm that a few large ones dominate is no statistic.
    if r.numel() < G2_ELEMENTS or square == 0 or square**2 / r.pow(4).sum().clamp(min=1e-300) < G2_ELEMENTS:
        return False
    # Neither are a few values that repeat, such as the sums of equal columns: they share their rounding errors too.
    every = math.ceil(r.numel() / G2_SAMPLE) | 1  # odd, so that the sample does not come from a single column
    return any(values[::every].float().unique().numel() >= G2_ELEMENTS for values in (r, error))

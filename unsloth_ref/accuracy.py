"""How accurate must a result be? About as accurate as plain PyTorch in the same dtype, whatever the operation.

    y   the result                                    e = y - r        its errors
    r   the truth: the reference in float64
    p   the peer: the reference in the dtype of y     e_p = p - r      the peer's errors

    ||e||     <= 1.5 max(||e_p||, floor)        the root mean square error (both sides times the root of the size)
    max |e|   <= 2   max(max |e_p|, floor)      the largest error

The peer may happen to make fewer roundings than a correct implementation may make. Then the floor decides: the error of
an implementation that makes all of them. Who compares knows the floors: the judge's gate G2 from the spec of an
operation (conformance/tolerances/gates.py), the trainer's verification from the inputs (unsloth_fast/comparison.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_FLOAT32 = 2.0**-24
ROUNDING_RMS = (8 * math.log(2)) ** -0.5  # 0.42: root mean square of a rounding to nearest, in units of u |x|
G2_RMS, G2_MAX = 1.5, 2.0  # the factors of the two inequalities
G2_ELEMENTS = 64  # fewer elements, or fewer distinct values, have no meaningful root mean square
G2_SAMPLE = 2**16  # elements among which distinct values are counted


def is_float(tensor: Tensor) -> bool:
    """Whether the elements are floating-point numbers to compute with: those of 8 bits are data, as integers are."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def widen(tensor: Tensor) -> Tensor:
    """Floating-point numbers in float64, for the truth; others unchanged."""
    return tensor.double() if is_float(tensor) else tensor


def widen_float8(tensor: Tensor) -> Tensor:
    """Floating-point numbers of 8 bits, for which torch has few operators, in float32; others unchanged."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def unit_roundoff(dtype: torch.dtype, truncates: bool = False) -> float:
    """u, the largest relative error of rounding to nearest; twice as large in bfloat16 if casts truncate."""
    return torch.finfo(dtype).eps / (1 if truncates and dtype == torch.bfloat16 else 2)


def float32_error(elements: int) -> float:
    """Largest relative error of float32 arithmetic on so many elements: 2 log2(n) 2^-24."""
    return 2 * max(1.0, math.log2(max(1, elements))) * UNIT_FLOAT32


@dataclass(frozen=True)
class Comparison:
    """One of the two inequalities for one result.

    Attributes:
        which: "root mean square" or "largest".
        factor: 1.5 or 2.
        measured: the error of the result: ||e|| or max |e|.
        peer: the same of the peer.
        floor: the error that is allowed, before the factor, even if the peer's is smaller.
    """

    which: str
    factor: float
    measured: float
    peer: float
    floor: float

    @property
    def allowed(self) -> float:
        """The right-hand side of the inequality."""
        return self.factor * max(self.peer, self.floor)

    @property
    def used(self) -> float:
        """The budget use, measured / allowed: above 1 if the inequality does not hold."""
        if self.measured == 0:
            return 0.0
        return self.measured / self.allowed if self.allowed > 0 else math.inf


def against_peer(error: Tensor, peer_error: Tensor, floors: tuple[float, float]) -> tuple[Comparison, Comparison]:
    """Both inequalities for one result.

    Args:
        error: e, float64, [n].
        peer_error: e_p, float64, [n].
        floors: of ||e|| and of max |e|.

    Returns:
        That of the root mean square error, then that of the largest.
    """
    rms, peer_rms = float(error.norm()), float(peer_error.norm())
    largest, peer_largest = float(error.abs().max()), float(peer_error.abs().max())
    return (
        Comparison("root mean square", G2_RMS, rms, peer_rms, floors[0]),
        Comparison("largest", G2_MAX, largest, peer_largest, floors[1]),
    )


def is_statistic(r: Tensor, error: Tensor) -> bool:
    """Whether a result has enough independent errors for the two inequalities: with few, chance decides.

    Args:
        r: the truth, float64, [n].
        error: e, float64, [n].
    """
    square = r.square().sum()
    # The effective number of elements: a norm that a few large ones dominate is no statistic.
    if r.numel() < G2_ELEMENTS or square == 0 or square**2 / r.pow(4).sum().clamp(min=1e-300) < G2_ELEMENTS:
        return False
    # Neither are a few values that repeat, such as the sums of equal columns: they share their rounding errors too.
    every = math.ceil(r.numel() / G2_SAMPLE) | 1  # odd, so that the sample does not come from a single column
    return any(values[::every].float().unique().numel() >= G2_ELEMENTS for values in (r, error))

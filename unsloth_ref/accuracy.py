"""How accurate must a result be? About as accurate as plain PyTorch, whatever the operation.

    y   the result        r   the truth: the reference in float64        p   the peer: the reference in the dtype of y

    ||y - r||     <= 1.5 max(||p - r||, floor)      if the elements are enough for a statistic
    max |y - r|   <= 2   max(max |p - r|, floor)

A floor is the error of a right computation that makes every rounding that it may, for the peer may make fewer. Gate G2
of the judge derives it from the spec of an operation (conformance/tolerances/gates.py). `compared` needs no spec:

    0.42 u ||r|| + ||r' - r||   of the norm         u max |r| + max |r' - r|   of the largest error

u is the unit roundoff of the result, and r' the truth on inputs and incoming gradients that are each moved by a unit in
the last place, up or down at random (in float32 by 2 log2(n) 2^-24, which sums in another order may differ by). So a
result may be as wrong as its inputs' own roundings make it. Inputs are moved by 2^-12 at least, so that other roundings
happen, and the change is scaled.

For a result too small for a statistic, such as a loss, chance makes a peer exact. Its peers are eight such moves more,
each with its own truth, and three times the root mean square of their errors and changes counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

UNIT_FLOAT32 = 2.0**-24
ROUNDING_RMS = (8 * math.log(2)) ** -0.5  # 0.42: of a rounding to nearest, in units of u |x|
G2_ELEMENTS = 64  # fewer elements, or copies of fewer errors, are no statistic
G2_RMS, G2_MAX = 1.5, 2.0
G2_SAMPLE = 2**16  # elements among which distinct values are counted
MOVES, SIGMAS = 8, 3.0  # for results too small for a statistic
SMALLEST_MOVE = 2.0**-12

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], list[Tensor]]


def unit_roundoff(dtype: torch.dtype, truncates: bool = False) -> float:
    """Largest relative error of rounding to nearest; twice as large in bfloat16 if casts truncate."""
    return torch.finfo(dtype).eps / (1 if truncates and dtype == torch.bfloat16 else 2)


def is_float(tensor: Tensor) -> bool:
    """Whether the elements are floating-point numbers to compute with: those of 8 bits are data, as integers are."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def widen(tensor: Tensor) -> Tensor:
    """Floating-point numbers in float64, for the truth; others unchanged."""
    return tensor.double() if is_float(tensor) else tensor


def widen_float8(tensor: Tensor) -> Tensor:
    """Floating-point numbers of 8 bits, for which torch has few operators, in float32; others unchanged."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


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


def compared(found: Sequence[Tensor | None], inputs: Tensors, run: Run) -> Iterator[Comparison]:
    """For each result of an operation the inequality that uses most of its budget.

    Args:
        found: the results; None for a missing one.
        inputs: all that they depend on, incoming gradients included, by name.
        run: computes the results by the reference, on inputs of any dtype.
    """
    truth, peer = run(_widened(inputs)), run(inputs)
    elements = max((tensor.numel() for tensor in (*inputs.values(), *truth)), default=1)
    scale = max(_wanted_move(tensor, elements) / _actual_move(tensor) for tensor in inputs.values() if is_float(tensor))
    generator = torch.Generator(next(iter(inputs.values())).device).manual_seed(0)
    changes: list[list[Tensor]] = []  # of the truth, of each move
    errors = [[p.double() - r for p, r in zip(peer, truth, strict=True)]]  # of the peer, and of that of some moves
    for place, (y, r, p) in enumerate(zip(found, truth, peer, strict=True)):
        wrong = _structure(y, r, p)
        if y is None or wrong:
            missing = Comparison(wrong, 1.0, math.inf, 0.0, 0.0)
            yield missing if y is not None or bool(r.any()) else replace(missing, measured=0.0)
            continue
        finite = y.isfinite() & r.isfinite() & p.isfinite()
        right, error = (tensor[finite] for tensor in (r, y.double() - r))
        if not error.numel():
            yield Comparison("largest", 1.0, 0.0, 0.0, 0.0)
            continue
        enough = is_statistic(right, error)
        while len(changes if enough else errors) < (1 if enough else 1 + MOVES):
            others = {key: _moved(tensor, generator) for key, tensor in inputs.items()}
            there = run(_widened(others))
            changes.append([scale * (other - one) for other, one in zip(there, truth, strict=True)])
            if not enough:
                errors.append([other.double() - one for other, one in zip(run(others), there, strict=True)])
        of_peer, change = (
            torch.stack([results[place][finite].nan_to_num() for results in several]) for several in (errors, changes)
        )
        yield _worst(y.dtype, right, error, of_peer, change, enough)


def _worst(dtype: torch.dtype, r: Tensor, error: Tensor, of_peer: Tensor, change: Tensor, enough: bool) -> Comparison:
    """The inequality of one result that uses most; of a result too small for a statistic, that of its largest error.

    Args:
        dtype: of the result.
        r: the truth, [n].
        error: of the result, [n].
        of_peer: errors of the peer without a move, then with some, [moves, n].
        change: how the truth changes, [moves, n].
        enough: whether the elements are enough for a statistic.
    """
    unit, limits = unit_roundoff(dtype), torch.finfo(dtype)
    tiny = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).tiny)
    if enough:
        rms = float(ROUNDING_RMS * unit * r.norm() + change[0].norm()) + tiny * r.numel() ** 0.5
        largest = float(unit * r.abs().max() + change[0].abs().max()) + tiny
        return max(against_peer(error, of_peer[0], (rms, largest)), key=lambda one: one.used)
    peers, changes = (SIGMAS * several.square().mean(0).sqrt() for several in (of_peer, change))
    return against_peer(error, peers, (math.inf, float(unit * r.abs().max() + changes.max()) + tiny))[1]


def _structure(y: Tensor | None, r: Tensor, p: Tensor) -> str:
    """What is wrong with a result besides its error; empty for nothing."""
    if y is None:
        return "no result"
    if y.shape != p.shape or y.dtype != p.dtype:
        return f"{y.dtype} of shape {list(y.shape)} instead of {p.dtype} of shape {list(p.shape)}"
    differs = (y.isfinite() != r.to(y.dtype).isfinite()) & (y.isfinite() != p.isfinite())
    return "infinite or NaN at other elements" if bool(differs.any()) else ""


def _widened(tensors: Tensors) -> Tensors:
    return {key: widen(tensor) for key, tensor in tensors.items()}


def _wanted_move(tensor: Tensor, elements: int) -> float:
    """The relative size of a move: one unit in the last place, or what float32 sums of so many may be off by."""
    return max(torch.finfo(tensor.dtype).eps, float32_error(elements))


def _actual_move(tensor: Tensor) -> float:
    """The same, not too small for other roundings to happen."""
    return max(torch.finfo(tensor.dtype).eps, SMALLEST_MOVE)


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The numbers of a floating-point tensor, each up or down."""
    if not is_float(tensor):
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device, dtype=torch.int8) * 2 - 1
    return (tensor.double() * (1 + _actual_move(tensor) * signs)).to(tensor.dtype)

"""Where tolerances are derived: four gates compare the judged tensor y with the truth r.

`judge` applies all four and returns the budget use: the largest measured / allowed of any gate, 1 at the bound.

    r   the truth: the reference in float64, on the inputs already rounded to the dtype under test
    p   the peer: the reference in the dtype of y, on the same device
    u   the unit roundoff of the dtype of y

The spec of the operation declares the error before the last rounding, as terms or as a bound. Its parts `largest`,
`independent`, `shared` and `scale` are derived in conformance/tolerances/bounds.py. Where `largest` is 0, only the last
rounding is allowed, so that an exact 0 must be 0.

Gates
    G0  Structure. y has the shape and dtype of p. NaN and infinity are where r, rounded, has the same, or where p has
        any and r none. If y is float32, 16 bits do not hold all its elements, unless they hold nearly all of r or of p;
        nor does float32 those of a y in float64.
    G1  Each element:
            |y - r| <= u |r| + largest + tiny
    G2  All elements together, if at least 64 of them differ:
            ||y - r||     <= 1.5 max(||p - r||, sqrt((0.42 u ||r||)^2 + ||independent||^2) + ||shared||)
            max |y - r|   <= 2   max(max |p - r|, u max |r| + max independent / 0.42 + max shared)
    G3  Bias, in 16 bits, over at least 1000 random elements:
            |b(y)| <= 0.25 + |b(p)|,    b(y) = mean of (y - r) sign(r) / max(u |r|, scale)
        and numbers half-way between two become the even one, see conformance/tolerances/ties.py, if model.ties

Derivation
    G0, where p has them: an intermediate overflows in the dtype, to an infinity or, if two of them meet, to NaN.
    G1, u |r|: the last rounding, to nearest.
    G1, tiny: one step of the subnormal numbers of the dtype, at least the smallest normal float32, to which the last
        rounding may round too; not where r and `largest` are 0.
    G2, 1.5 and 2: a kernel must be about as accurate as plain PyTorch.
    G2, floors: the contract allows roundings that plain PyTorch happens not to make: it may be exact, or round fewer
        terms before their sum, than another right kernel. A floor is the error of a kernel that makes all of them. The
        root mean square of the last rounding, 0.42 u |r|, and of the independent ones before it add as squares; float32
        roundings that a whole row shares do not average out. A single rounding may reach u |r|, and independent / 0.42.
        A subnormal number is rounded as the smallest normal one, which stands for |r| there.
    G2, row factors: a rounding that the contract allows may be shared by a row too. If a row is a multiple of one
        number, as a gradient through a single logit is, that rounding scales the whole row, and its sign is chance. A
        result that fails G2 is therefore judged again without the factor of each row, removed from both errors, as far
        as `roundings` u explain the factor, or twice the row's ||independent|| / ||r||. G1 bounds the factor.
    G2, 64 that differ: fewer errors, or copies of one error, are no statistic.
    G3, 0.25: the mean of rounding errors is near 0, that of truncation errors near 1; drift is in between. The mean of
        256 distinct rounding errors, the fewest that are judged, has a standard deviation below 0.04.
    G3, mean over distinct values of y: equal elements share one rounding error.
    G3, |b(p)|: in a row that was scaled by a factor near 1, all rounding errors lean to one side; the peer's do too.

Triton's interpreter truncates float32 to bfloat16 instead of rounding to nearest. For results that it computed in
bfloat16, u is 2^-7, twice the usual value, and G2 and G3 are skipped, because they would only find the truncation.
"""

import sys
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from conformance.tolerances.bounds import Arithmetic
from conformance.tolerances.ties import other_rule
from unsloth_ref.accuracy import ROUNDING_RMS, against_peer, is_statistic, unit_roundoff, widen_float8

G0_ELEMENTS, G0_SAMPLE = 16, 2**16
OVERFLOWING = 2.0**118  # of 2^128
G3_ELEMENTS, G3_DISTINCT, G3_BIAS = 1000, 256, 0.25
SLICE_ELEMENTS = 2**26  # G3 works on slices: memory may not hold several float64 copies of all elements


class Failure(Exception):
    """A property does not hold; the message gives the measured and the allowed value."""

    def __init__(self, message: str, used: float | None = None) -> None:
        """`used` is the fraction of the error budget, if one was measured."""
        super().__init__(message)
        self.used = used


class Unchecked(Exception):
    """A property says nothing about a case; the message states why. Neither a failure nor a pass."""


class Allowance(Protocol):
    """The error that Terms, Bound or a measured Response allows; see conformance/tolerances/bounds.py."""

    def largest(self, how: Arithmetic) -> Tensor:
        """No correct result exceeds it."""
        ...

    def independent(self, how: Arithmetic) -> Tensor:
        """Root mean square of the roundings that differ from element to element."""
        ...

    def shared(self) -> Tensor:
        """Roundings that a whole row may share."""
        ...

    def scale(self, how: Arithmetic) -> Tensor:
        """The unit of a mean error."""
        ...


@dataclass(frozen=True)
class ErrorModel:
    """The inputs of the gates besides y, r and p.

    Attributes:
        error: terms of y or a bound of its error before the last rounding, broadcastable to r, float64.
        elements: n.
        roundings: roundings to the dtype of y that the contract allows before the last one.
        random: whether the elements differ, so that their rounding errors can be expected to cancel.
        truncates: whether casts to bfloat16 truncate (Triton's interpreter).
        jumps: elements at a discontinuity, which are no part of the statistics of G2 and G3.
        other: r, or what it is with other roundings where one of both is infinite or NaN and the other is not so.
        ties: whether to ask how ties are rounded; not where an inexact factor that is shared, such as sigmoid(0), may
            move all of them to one side.
    """

    error: Allowance
    elements: int
    roundings: int
    random: bool = True
    truncates: bool = False
    jumps: Tensor | None = None
    other: Tensor | None = None
    ties: bool = True


def judge(name: str, y: Tensor, r: Tensor, p: Tensor, model: ErrorModel) -> float:
    """Compare y with the truth r and the peer p.

    Args:
        name: what y is, for messages: "output loss", "gradient of x".
        y: the judged tensor.
        r: the truth, float64, on the device of y.
        p: the peer, in the dtype that y must have.
        model: what y may be off by.

    Returns:
        The budget use: the largest measured / allowed over all gates, at most 1.

    Raises:
        Failure: a gate is broken.
    """
    _structure(name, y, r, p, r if model.other is None else model.other)
    dtype, (y, p) = y.dtype, (widen_float8(y), widen_float8(p))
    finite = r.isfinite() & y.isfinite()
    if not finite.any():
        return 0.0
    unit = unit_roundoff(dtype, model.truncates)
    how = Arithmetic(unit, model.roundings, model.elements)
    all_finite = bool(finite.all())

    def selected(tensor: Tensor) -> Tensor:
        tensor = tensor.expand(r.shape)
        return tensor.reshape(-1) if all_finite else tensor[finite]  # a copy of 2^29 elements would take 4 GiB

    def allowed(error: Tensor) -> Tensor:
        return selected(error.nan_to_num(posinf=0.0))

    wide, truth, peer = selected(y).double(), selected(r), selected(torch.where(p.isfinite(), p.double(), r))
    used = _componentwise(name, wide, truth, allowed(model.error.largest(how)), unit, dtype, finite)
    if model.truncates and dtype == torch.bfloat16:
        return used
    judged = selected(y)
    independent, shared, scale = (
        allowed(error) for error in (model.error.independent(how), model.error.shared(), model.error.scale(how))
    )
    if model.jumps is not None and bool(model.jumps.any()):
        steady = ~selected(model.jumps)
        wide, truth, peer, judged = (tensor[steady] for tensor in (wide, truth, peer, judged))
        independent, shared, scale = (tensor[steady] for tensor in (independent, shared, scale))
        finite = finite & ~model.jumps
        if not len(truth):
            return used
    floors = _floors(truth, independent, shared, unit, torch.finfo(dtype).smallest_normal)
    errors = wide - truth, peer - truth
    used = max(used, _with_row_factors(name, *errors, truth, floors, finite, independent, model.roundings * unit))
    if dtype.itemsize == 2:
        if model.ties:
            _ties(name, judged, truth, peer)
        used = max(used, _bias(name, judged, truth, peer, scale, unit) if model.random else 0.0)
    return used


def _structure(name: str, y: Tensor, r: Tensor, p: Tensor, other: Tensor) -> None:
    if y.shape != r.shape:
        raise Failure(f"gate G0: {name} has shape {list(y.shape)}, should be {list(r.shape)}")
    if y.dtype != p.dtype:
        raise Failure(f"gate G0: {name} has dtype {y.dtype}, should be {p.dtype}")
    rounded, dtype = widen_float8(r.to(y.dtype)), y.dtype
    y, p = widen_float8(y), widen_float8(p)
    # Within 1 % of the largest number, one more rounding decides whether a value overflows; near that of float32, which
    # none but a number that overflows elsewhere comes to, also the order of factors.
    edge = ((r.abs() / torch.finfo(dtype).max - 1).abs() < 0.01) & ~y.isnan() & (y.sign() == r.sign())
    edge |= (r.abs() > OVERFLOWING) & y.isinf() & (y.sign() == r.sign())
    wrong = (y.isnan() != rounded.isnan()) | ((y.isinf() | rounded.isinf()) & (y != rounded) & ~rounded.isnan() & ~edge)
    # Infinity times a value that is 0 in float32 but not in float64: infinite in r, NaN in any float32 result.
    overflows = rounded.isfinite() & ~p.isfinite() & ~y.isfinite()
    wrong &= ~((y.isnan() & p.isnan()) | (y.isinf() & (y == p)) | overflows)
    decided = (other != r) & ~(other.isnan() & r.isnan())  # by roundings
    wrong &= ~(decided & (~r.isfinite() | (y == other) | (y.isnan() & other.isnan())))
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise Failure(
            f"gate G0: {name} is {float(y[index])!r} at index {index}, should be {float(rounded[index])!r}\n"
            f"{int(wrong.sum())} of {wrong.numel()} elements; reference {float(r[index])!r}"
        )
    if dtype.itemsize > 2:
        _digits(name, y, r, p)


def _digits(name: str, y: Tensor, r: Tensor, p: Tensor) -> None:
    """A float32 result that was rounded to 16 bits on its way has none of the digits that only float32 holds.

    Likewise a float64 result that was rounded to float32.

    An element without a correct bit, such as the 0 of terms that cancel, says nothing: the digits of r and p are noise.
    Nor do a few values that repeat: 16 bits may hold them by chance.
    """
    own = y.dtype
    y, r, p = (tensor.reshape(-1)[:G0_SAMPLE].to(own) for tensor in (y, r, p))
    for dtype in (torch.bfloat16, torch.float16, *((torch.float32,) if own == torch.float64 else ())):
        held, r_held, p_held = ((t == t.to(dtype).to(own)) | ~t.isfinite() for t in (y, r, p))
        wrong = ~(r_held | p_held) & ((y - r).abs() < r.abs() / 2)
        if held.all() and wrong.sum() >= G0_ELEMENTS and y[wrong].unique().numel() >= G0_ELEMENTS:
            index = int(wrong.nonzero()[0])
            raise Failure(
                f"gate G0: {name} was rounded to {dtype}, should be {own}\n"
                f"{float(y[index])!r} at index {index} of the flattened tensor; reference {float(r[index])!r}"
            )


def _componentwise(
    name: str, y: Tensor, r: Tensor, before: Tensor, unit: float, dtype: torch.dtype, finite: Tensor
) -> float:
    tiny = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
    allowed = unit * r.abs() + before + tiny * ((before > 0) | (r != 0))
    error = (y - r).abs()
    ratio = torch.where(error == 0, 0.0, error / allowed)
    worst = int(ratio.argmax())
    used = min(float(ratio[worst]), sys.float_info.max)  # the ratio is infinite where no error is allowed
    if used > 1:
        index = tuple(finite.nonzero()[worst].tolist())
        raise Failure(
            f"gate G1 used {used:.3g} of the budget in {name} at index {index}\n"
            f"measured {float(error[worst]):.2g}, allowed {float(allowed[worst]):.2g};"
            f" reference {float(r[worst])!r}, got {float(y[worst])!r}",
            used,
        )
    return used


def _with_row_factors(
    name: str,
    error: Tensor,
    peer_error: Tensor,
    r: Tensor,
    floors: tuple[float, float],
    finite: Tensor,
    independent: Tensor,
    roundings: float,
) -> float:
    """Gate G2; if it is broken, again without a factor of each row, as far as roundings explain it, if any do."""
    try:
        return _against_peer(name, error, peer_error, r, floors)
    except Failure:
        if not roundings and not independent.any():
            raise
    row = torch.arange(finite.numel(), device=r.device).view(finite.shape)[finite]
    row //= finite.shape[-1] if finite.ndim else 1

    def sums(values: Tensor) -> Tensor:
        return r.new_zeros(int(row[-1]) + 1).index_add_(0, row, values)

    square = sums(r * r)
    most = (2 * (sums(independent * independent) / square).sqrt()).clamp(min=roundings)

    def without_factor(error: Tensor) -> Tensor:
        factor = torch.where(square > 0, (sums(r * error) / square).clamp(-most, most), 0.0)
        return error - factor[row] * r

    return _against_peer(name, without_factor(error), without_factor(peer_error), r, floors)


def _floors(r: Tensor, independent: Tensor, shared: Tensor, unit: float, smallest: float) -> tuple[float, float]:
    """The root mean square and the largest error that G2 allows before it multiplies, whatever the peer's."""
    size = r.abs().clamp(min=smallest) * (r != 0)
    root = (ROUNDING_RMS * unit * size.norm()).hypot(independent.norm()) + shared.norm()
    largest = unit * size.max() + independent.max() / ROUNDING_RMS + shared.max()
    return float(root), float(largest)


def _against_peer(name: str, error: Tensor, peer_error: Tensor, r: Tensor, floors: tuple[float, float]) -> float:
    if not is_statistic(r, error):
        return 0.0
    used = 0.0
    for one in against_peer(error, peer_error, floors):
        used = max(used, one.used)
        if one.used > 1:
            raise Failure(
                f"gate G2 used {one.used:.3g} of the budget in {name}: {one.which} error of {len(r)} elements\n"
                f"measured {one.measured:.3g}, allowed {one.allowed:.3g}: {one.factor} times plain PyTorch,"
                f" {one.peer:.3g}, or the floor, {one.floor:.3g}",
                one.used,
            )
    return used


def _ties(name: str, y: Tensor, r: Tensor, p: Tensor) -> None:
    if rule := other_rule(y, r, p):
        raise Failure(f"gate G3: {name} rounds numbers half-way between two {rule}, should take the even one")


def _bias(name: str, y: Tensor, r: Tensor, p: Tensor, least: Tensor, unit: float) -> float:
    smallest = torch.finfo(y.dtype).smallest_normal
    sums, peer_sums, counts = (r.new_zeros(2**16) for _ in range(3))  # one entry per value that 16 bits can represent
    slices = zip(*(tensor.split(SLICE_ELEMENTS) for tensor in (y, r, p, least)), strict=True)
    for y, r, p, least in slices:
        normal = r.abs() >= smallest
        value = y.view(torch.int16)[normal].int() + 2**15
        scale = r.sign() / torch.maximum(unit * r.abs(), least)
        for total, one in ((sums, y), (peer_sums, p)):
            total.index_add_(0, value, ((one.double() - r) * scale)[normal])
        counts += value.bincount(minlength=2**16)
    distinct = counts > 0
    if counts.sum() < G3_ELEMENTS or distinct.sum() < G3_DISTINCT:
        return 0.0
    bias, peer_bias = (float((total[distinct] / counts[distinct]).mean().abs()) for total in (sums, peer_sums))
    allowed = G3_BIAS + peer_bias
    if bias > allowed:
        raise Failure(
            f"gate G3 used {bias / allowed:.3g} of the budget in {name}: results are biased to one side\n"
            f"mean error {bias:.2g} unit roundoffs over {int(distinct.sum())} distinct values, allowed {allowed:.2g}",
            bias / allowed,
        )
    return bias / allowed

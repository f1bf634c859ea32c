"""Where tolerances are derived: four gates compare the judged tensor y with the truth r.

`judge` applies all four and returns the budget use: the largest measured / allowed of any gate, 1 at the bound.

    r   the truth: the reference in float64, on the inputs already rounded to the dtype under test
    p   the peer: the reference in the dtype of y, on the same device
    u   the unit roundoff of the dtype of y
    n   the number of elements that enter a result
    S   the size of the terms that were added up; |r| if nothing cancels. S = 0 requires the exact value

Gates
    G0  Structure. y has the shape and dtype of p. NaN and infinity are where r, rounded, has them, or where p has the
        same.
    G1  Each element:
            |y - r| <= u |r|  +  roundings u (1 + u) S  +  2 log2(n) 2^-24 S  +  tiny
    G2  All elements together, if at least 64 of them differ:
            ||y - r||     <= 1.5 max(||p - r||, 0.3 u ||r|| + 2^-23 ||S||)
            max |y - r|   <= 2   max(max |p - r|, u max |r| + 2^-23 max S)
    G3  Bias, in 16 bits, over at least 1000 random elements:
            |b(y)| <= 0.25 + |b(p)|,    b(y) = mean of (y - r) sign(r) / (u max(|r|, S))

Derivation
    G1, u |r|: the last rounding, to nearest.
    G1, roundings u (1 + u) S: the roundings that the contract allows before the last one; `roundings` and S are
        declared by the spec of the operation (conformance/specs/).
    G1, 2 log2(n) 2^-24 S: float32 arithmetic. Pairwise summation has an error of at most log2(n) 2^-24 S (Higham 2002,
        section 4.2), and elementary functions have roundings of their own. The factor 2 allows longer sequential sums.
    G1, tiny: one step of the subnormal numbers of the dtype, at least the smallest normal float32; 0 where S = 0.
    G2, 1.5 and 2: a kernel must be about as accurate as plain PyTorch.
    G2, floors: a peer that happens to be exact must not make the gate impossible to pass. 2^-23 S is four float32
        roundings that a whole row shares (a mean, a root, a reciprocal, a product), which do not average out.
    G2, row factors: a rounding that the contract allows may be shared by a row too. If a row is a multiple of one
        number, as a gradient through a single logit is, that rounding scales the whole row, and its sign is chance. A
        result that fails G2 is therefore judged again without the factor of each row, removed from both errors, as far
        as `roundings` u explain the factor. G1 bounds the factor.
    G2, 64 that differ: fewer errors, or copies of one error, are no statistic.
    G3, 0.25: the mean of rounding errors is near 0, that of truncation errors near 1; drift is in between. The mean of
        256 distinct rounding errors, the fewest that are judged, has a standard deviation below 0.04.
    G3, mean over distinct values of y: equal elements share one rounding error.
    G3, |b(p)|: in a row that was scaled by a factor near 1, all rounding errors lean to one side; the peer's do too.

Triton's interpreter truncates float32 to bfloat16 instead of rounding to nearest. For results that it computed in
bfloat16, u is 2^-7, twice the usual value, and G2 and G3 are skipped, because they would only find the truncation.
"""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_FLOAT32 = 2.0**-24
G2_ELEMENTS, G2_RMS, G2_MAX = 64, 1.5, 2.0
G2_SAMPLE = 2**16  # elements among which distinct values are counted
G3_ELEMENTS, G3_DISTINCT, G3_BIAS = 1000, 256, 0.25
SLICE_ELEMENTS = 2**26  # G3 works on slices: memory may not hold several float64 copies of all elements


class Failure(Exception):
    """A property does not hold; the message gives the measured and the allowed value."""

    def __init__(self, message: str, used: float | None = None) -> None:
        """`used` is the fraction of the error budget, if one was measured."""
        super().__init__(message)
        self.used = used


@dataclass(frozen=True)
class ErrorModel:
    """What the gates need besides y, r and p.

    Attributes:
        terms: S, broadcastable to r, float64.
        elements: n.
        roundings: roundings to the dtype of y that the contract allows before the last one.
        random: whether the elements differ, so that their rounding errors can be expected to cancel.
        truncates: whether casts to bfloat16 truncate (Triton's interpreter).
        extra: an error that G1 allows besides, broadcastable to r, where the condition is measured.
        jumps: elements at a discontinuity, which are no part of the statistics of G2 and G3.
    """

    terms: Tensor
    elements: int
    roundings: int
    random: bool = True
    truncates: bool = False
    extra: Tensor | None = None
    jumps: Tensor | None = None


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def judge(name: str, y: Tensor, r: Tensor, p: Tensor, model: ErrorModel) -> float:
    """Compare y with the truth r and the peer p.

    Args:
        name: what y is, for messages: "output loss", "gradient of x".
        y: the judged tensor.
        r: the truth, float64, on the device of y.
        p: the peer, in the dtype that y must have.
        model: terms, elements and roundings.

    Returns:
        The budget use: the largest measured / allowed over all gates, at most 1.

    Raises:
        Failure: a gate is broken.
    """
    _structure(name, y, r, p)
    finite = r.isfinite() & y.isfinite()
    if not finite.any():
        return 0.0
    truncates = model.truncates and y.dtype == torch.bfloat16
    unit = unit_roundoff(y.dtype) * (2 if truncates else 1)
    all_finite = bool(finite.all())

    def selected(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1) if all_finite else tensor[finite]  # a copy of 2^29 elements would take 4 GiB

    wide, truth, terms = selected(y).double(), selected(r), selected(model.terms.expand(r.shape))
    peer = selected(torch.where(p.isfinite(), p.double(), r))
    extra = None if model.extra is None else selected(model.extra.expand(r.shape)) * unit / unit_roundoff(y.dtype)
    used = _componentwise(name, wide, truth, terms, unit, model, y.dtype, finite, extra)
    judged = selected(y)
    if model.jumps is not None and bool(model.jumps.any()):
        steady = ~selected(model.jumps)
        wide, truth, terms, peer, judged = (tensor[steady] for tensor in (wide, truth, terms, peer, judged))
        finite = finite & ~model.jumps
    if not truncates and len(truth):
        error, peer_error = wide - truth, peer - truth
        try:
            against_peer = _against_peer(name, error, peer_error, truth, terms, unit)
        except Failure:
            if not model.roundings and model.extra is None:
                raise
            row = torch.arange(r.numel(), device=r.device).view(r.shape)[finite] // (r.shape[-1] if r.ndim else 1)
            most = max(1, model.roundings) * unit
            error = _without_factor(error, truth, row, most)
            peer_error = _without_factor(peer_error, truth, row, most)
            against_peer = _against_peer(name, error, peer_error, truth, terms, unit)
        used = max(used, against_peer)
        del error, peer_error
        if y.dtype != torch.float32 and model.random:
            used = max(used, _bias(name, judged, truth, peer, terms, unit))
    return used


def judge_exact(name: str, y: Tensor, r: Tensor, p: Tensor, flips: Tensor, lowest: float, highest: float) -> None:
    """Compare integers and booleans: each must be that of the truth or of the peer.

    Where a rounding changes the reference's result (`flips`: a tie, a threshold), any value from `lowest` to `highest`
    is accepted.

    Raises:
        Failure: shape, dtype or an element differs.
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


def _structure(name: str, y: Tensor, r: Tensor, p: Tensor) -> None:
    if y.shape != r.shape:
        raise Failure(f"gate G0: {name} has shape {list(y.shape)}, should be {list(r.shape)}")
    if y.dtype != p.dtype:
        raise Failure(f"gate G0: {name} has dtype {y.dtype}, should be {p.dtype}")
    rounded = r.to(y.dtype)
    # Within 1 % of the largest number, one more rounding decides whether a value overflows.
    edge = ((r.abs() / torch.finfo(y.dtype).max - 1).abs() < 0.01) & ~y.isnan() & (y.sign() == r.sign())
    wrong = (y.isnan() != rounded.isnan()) | ((y.isinf() | rounded.isinf()) & (y != rounded) & ~rounded.isnan() & ~edge)
    # Infinity times a value that is 0 in float32 but not in float64: infinite in r, NaN in any float32 result.
    wrong &= ~((y.isnan() & p.isnan()) | (y.isinf() & (y == p)))
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise Failure(
            f"gate G0: {name} is {float(y[index])!r} at index {index}, should be {float(rounded[index])!r}\n"
            f"{int(wrong.sum())} of {wrong.numel()} elements; reference {float(r[index])!r}"
        )


def _componentwise(
    name: str, y: Tensor, r: Tensor, terms: Tensor, unit: float, model: ErrorModel, dtype: torch.dtype, finite: Tensor,
    extra: Tensor | None,
) -> float:  # fmt: skip
    tiny = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
    depth = max(1.0, math.log2(max(model.elements, 1)))
    allowed = unit * r.abs() + (model.roundings * unit * (1 + unit) + 2 * depth * UNIT_FLOAT32) * terms
    allowed += tiny * (terms > 0)
    if extra is not None:
        allowed += extra
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


def _without_factor(error: Tensor, r: Tensor, row: Tensor, most: float) -> Tensor:
    """Errors without their best-fitting multiple of each row of r, a factor of at most `most`."""
    along, square = (r.new_zeros(int(row[-1]) + 1).index_add_(0, row, r * value) for value in (error, r))
    factor = torch.where(square > 0, along / square, 0.0).clamp(-most, most)
    return error - factor[row] * r


def _against_peer(name: str, error: Tensor, peer_error: Tensor, r: Tensor, terms: Tensor, unit: float) -> float:
    square = r.square().sum()
    # The effective number of elements: a norm that a few large ones dominate is no statistic.
    if r.numel() < G2_ELEMENTS or square == 0 or square**2 / r.pow(4).sum().clamp(min=1e-300) < G2_ELEMENTS:
        return 0.0
    # Neither are a few values that repeat, such as the sums of equal columns: they share their rounding errors too.
    every = math.ceil(r.numel() / G2_SAMPLE) | 1  # odd, so that the sample does not come from a single column
    if all(values[::every].float().unique().numel() < G2_ELEMENTS for values in (r, error)):
        return 0.0
    rms, peer_rms = float(error.norm()), float(peer_error.norm())
    rms_floor = float(0.3 * unit * r.norm() + 2 * UNIT_FLOAT32 * terms.norm())
    largest, peer_largest = float(error.abs().max()), float(peer_error.abs().max())
    largest_floor = float(unit * r.abs().max() + 2 * UNIT_FLOAT32 * terms.max())
    used = 0.0
    for which, factor, measured, other, floor in (
        ("root mean square", G2_RMS, rms, peer_rms, rms_floor),
        ("largest", G2_MAX, largest, peer_largest, largest_floor),
    ):
        allowed = factor * max(other, floor)
        used = max(used, measured / allowed)
        if measured > allowed:
            raise Failure(
                f"gate G2 used {measured / allowed:.3g} of the budget in {name}: {which} error of {len(r)} elements\n"
                f"measured {measured:.3g}, allowed {allowed:.3g}: {factor} times plain PyTorch, {other:.3g},"
                f" or the floor, {floor:.3g}",
                measured / allowed,
            )
    return used


def _bias(name: str, y: Tensor, r: Tensor, p: Tensor, terms: Tensor, unit: float) -> float:
    smallest = torch.finfo(y.dtype).smallest_normal
    sums, peer_sums, counts = (r.new_zeros(2**16) for _ in range(3))  # one entry per value that 16 bits can represent
    slices = zip(*(tensor.split(SLICE_ELEMENTS) for tensor in (y, r, p, terms)), strict=True)
    for y, r, p, terms in slices:
        normal = r.abs() >= smallest
        value = y.view(torch.int16)[normal].int() + 2**15
        scale = r.sign() / (unit * torch.maximum(r.abs(), terms))
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

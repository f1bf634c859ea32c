"""When a result is right: four gates between the judged tensor y and the truth r, and one number out.

    G0  shape, dtype, NaN and infinity where the truth, rounded, has them, or where p has the same
    G1  |y - r| <= u |r| + roundings u (1 + u) S + 2 log2(n) 2^-24 S + tiny      every element
    G2  ||y - r|| <= 1.5 max(||p - r||, floor); 2 x for the largest element      of at least 64 that differ
    G3  |mean of (y - r) sign(r) / (u max(|r|, S))| <= 0.25 + the same of p      of at least 1000 random ones, 16-bit

r is the reference in float64 on the inputs already rounded; p, the peer, is the reference in the dtype of y on the
same device; u the unit roundoff of that dtype; n the number of elements that enter; S the size of the terms that were
added up (|r| where nothing cancels), so that S = 0 demands the exact value. G1's first term is the last rounding, the
second the roundings that the contract allows on the way, the third float32 arithmetic: pairwise sums (Higham 2002,
section 4.2) and elementary functions, twice over for whoever sums in longer runs. G2 holds a kernel to the accuracy of
plain PyTorch; its floor, 0.3 u ||r|| + 2^-23 ||S||, keeps a peer that happens to be exact from making it impossible:
four float32 roundings that a whole row shares (a mean, a root, a reciprocal, a product) average out nowhere. Nor does
one of the roundings that the contract allows on the way: where a row is a multiple of one number, as the gradient by
the only logit that counts is, it moves the row by a factor, and which way is luck. So what fails G2 as it is may pass
with the factor of each row, so far as roundings u explain it, taken out of both errors; G1 bounds it. G3 finds
truncation and drift. Its mean is over distinct values of y, since elements that are all alike share one rounding error;
and it grants the peer's own, since a row times a factor near 1 has rounding errors that all lean one way.

Triton's interpreter truncates float32 to bfloat16 instead of rounding to nearest: there u is 2^-7, twice as much, and
G2 and G3, which see nothing else, are left out.
"""

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_FLOAT32 = 2.0**-24
G2_ELEMENTS, G2_RMS, G2_MAX = 64, 1.5, 2.0
G2_SAMPLE = 2**16  # elements among which different ones are counted
G3_ELEMENTS, G3_DISTINCT, G3_BIAS = 1000, 256, 0.25
SLICE = 2**26  # elements that G3 looks at together: there may be more than memory for several copies of them


class Failure(Exception):
    """A property that does not hold; its text says what was measured and what was allowed."""

    def __init__(self, message: str, used: float | None = None) -> None:
        """Used is the share of the error budget, where one was measured."""
        super().__init__(message)
        self.used = used


@dataclass(frozen=True)
class Measure:
    """What the gates need beside y, r and p.

    Attributes:
        terms: S, broadcastable to r, float64.
        elements: n.
        roundings: roundings to the dtype of y that the contract allows before the last one.
        random: whether the elements differ, so that their rounding errors can be expected to cancel.
        truncates: whether casts to bfloat16 truncate (Triton's interpreter).
    """

    terms: Tensor
    elements: int
    roundings: int
    random: bool = True
    truncates: bool = False


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def judge(name: str, y: Tensor, r: Tensor, p: Tensor, measure: Measure) -> float:
    """Hold y against the truth r and the peer p.

    Args:
        name: what y is, for the message: "output loss", "gradient of x".
        y: the judged tensor.
        r: the truth, float64, on the device of y.
        p: the peer, in the dtype that y must have.
        measure: terms, elements and roundings.

    Returns:
        The budget used: the largest measured / allowed over all gates, at most 1.

    Raises:
        Failure: a gate is broken.
    """
    _structure(name, y, r, p)
    finite = r.isfinite() & y.isfinite()
    if not finite.any():
        return 0.0
    truncates = measure.truncates and y.dtype == torch.bfloat16
    unit = unit_roundoff(y.dtype) * (2 if truncates else 1)
    everything = bool(finite.all())

    def kept(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1) if everything else tensor[finite]  # a copy of 2^29 elements would take 4 GiB

    wide, truth, terms = kept(y).double(), kept(r), kept(measure.terms.expand(r.shape))
    peer = kept(torch.where(p.isfinite(), p.double(), r))
    used = _componentwise(name, wide, truth, terms, unit, measure, y.dtype, finite)
    if not truncates:
        error, peer_error = wide - truth, peer - truth
        try:
            against_peer = _against_peer(name, error, peer_error, truth, terms, unit)
        except Failure:
            if not measure.roundings:
                raise
            row = torch.arange(r.numel(), device=r.device).view(r.shape)[finite] // (r.shape[-1] if r.ndim else 1)
            most = measure.roundings * unit
            error = _without_factor(error, truth, row, most)
            peer_error = _without_factor(peer_error, truth, row, most)
            against_peer = _against_peer(name, error, peer_error, truth, terms, unit)
        used = max(used, against_peer)
        del error, peer_error
        if y.dtype != torch.float32 and measure.random:
            used = max(used, _bias(name, kept(y), truth, peer, terms, unit))
    return used


def _structure(name: str, y: Tensor, r: Tensor, p: Tensor) -> None:
    if y.shape != r.shape:
        raise Failure(f"gate G0: {name} has shape {list(y.shape)}, should be {list(r.shape)}")
    if y.dtype != p.dtype:
        raise Failure(f"gate G0: {name} has dtype {y.dtype}, should be {p.dtype}")
    rounded = r.to(y.dtype)
    # At the very edge of overflow one more rounding may fall on either side of it.
    edge = ((r.abs() / torch.finfo(y.dtype).max - 1).abs() < 0.01) & ~y.isnan() & (y.sign() == r.sign())
    wrong = (y.isnan() != rounded.isnan()) | ((y.isinf() | rounded.isinf()) & (y != rounded) & ~rounded.isnan() & ~edge)
    # An infinity times what float64 still holds and float32 does not: inf there, NaN in float32 for anybody.
    wrong &= ~((y.isnan() & p.isnan()) | (y.isinf() & (y == p)))
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise Failure(
            f"gate G0: {name} is {float(y[index])!r} at index {index}, should be {float(rounded[index])!r}\n"
            f"{int(wrong.sum())} of {wrong.numel()} elements; reference {float(r[index])!r}"
        )


def _componentwise(
    name: str, y: Tensor, r: Tensor, terms: Tensor, unit: float, measure: Measure, dtype: torch.dtype, finite: Tensor
) -> float:
    tiny = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
    depth = max(1.0, math.log2(max(measure.elements, 1)))
    allowed = unit * r.abs() + (measure.roundings * unit * (1 + unit) + 2 * depth * UNIT_FLOAT32) * terms
    allowed += tiny * (terms > 0)
    error = (y - r).abs()
    ratio = torch.where(error == 0, 0.0, error / allowed)
    worst = int(ratio.argmax())
    used = min(float(ratio[worst]), sys.float_info.max)  # where nothing is allowed, any error is infinitely too much
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
    """Errors, less that multiple of each row of r, at most this large, that fits them best."""
    along, square = (r.new_zeros(int(row[-1]) + 1).index_add_(0, row, r * value) for value in (error, r))
    factor = torch.where(square > 0, along / square, 0.0).clamp(-most, most)
    return error - factor[row] * r


def _against_peer(name: str, error: Tensor, peer_error: Tensor, r: Tensor, terms: Tensor, unit: float) -> float:
    square = r.square().sum()
    # Elements that carry weight: a norm that a few large ones dominate is no statistic.
    if r.numel() < G2_ELEMENTS or square == 0 or square**2 / r.pow(4).sum().clamp(min=1e-300) < G2_ELEMENTS:
        return 0.0
    # Nor is one of a few values over and over, such as the sums of equal columns: they share their rounding errors too.
    every = math.ceil(r.numel() / G2_SAMPLE) | 1  # odd, so as not to look at one column alone
    if all(values[::every].float().unique().numel() < G2_ELEMENTS for values in (r, error)):
        return 0.0
    rms, peer_rms = float(error.norm()), float(peer_error.norm())
    floor = float(0.3 * unit * r.norm() + 2 * UNIT_FLOAT32 * terms.norm())
    high, peer_high = float(error.abs().max()), float(peer_error.abs().max())
    high_floor = float(unit * r.abs().max() + 2 * UNIT_FLOAT32 * terms.max())
    used = 0.0
    for kind, factor, measured, other, least in (
        ("root mean square", G2_RMS, rms, peer_rms, floor),
        ("largest", G2_MAX, high, peer_high, high_floor),
    ):
        allowed = factor * max(other, least)
        used = max(used, measured / allowed)
        if measured > allowed:
            raise Failure(
                f"gate G2 used {measured / allowed:.3g} of the budget in {name}: {kind} error of {r.numel()} elements\n"
                f"measured {measured:.3g}, allowed {allowed:.3g}; {factor} times plain PyTorch, {other:.3g}",
                measured / allowed,
            )
    return used


def _bias(name: str, y: Tensor, r: Tensor, p: Tensor, terms: Tensor, unit: float) -> float:
    smallest = torch.finfo(y.dtype).smallest_normal
    sums, peer_sums, counts = (r.new_zeros(2**16) for _ in range(3))  # of each value that 16 bits can hold
    slices = zip(*(tensor.split(SLICE) for tensor in (y, r, p, terms)), strict=True)
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
    lean, peer_lean = (float((total[distinct] / counts[distinct]).mean().abs()) for total in (sums, peer_sums))
    bias, allowed = lean, G3_BIAS + peer_lean
    if bias > allowed:
        raise Failure(
            f"gate G3 used {bias / allowed:.3g} of the budget in {name}: results lean to one side\n"
            f"mean error {bias:.2g} unit roundoffs over {int(distinct.sum())} distinct values, allowed {allowed:.2g}",
            bias / allowed,
        )
    return bias / allowed

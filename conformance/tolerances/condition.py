"""How much may a correct kernel differ, where no spec says so? Measured on the reference itself.

Gate G1 needs to know how large a rounding can become on its way to an output. A spec states it by hand: S, the size of
the terms that are added up, and the number of roundings. Without one, the judge runs the reference in float64 and
disturbs it as the roundings of a computation would, in the forward and in the backward pass:

    B   every input, every incoming gradient and the result of every operator of PyTorch by one unit roundoff of
        float32, 2^-24: the response is the error of a kernel that computes in float32
    A   the result of every operator that the reference, run in the dtype under test, rounds to that dtype, by one unit
        roundoff of the dtype: the response is the error of plain PyTorch. Where nothing is rounded to 16 bits on the
        way, A is 0. The run in the dtype shows which operators those are; their order is the same.
        The last rounding of a result, which nothing else reads, is left out: G1 has a term for it.
    C   the result of every sum of n > 64 terms x by sqrt(n) 2^-24 P, P the sum of the positive terms or of the negative
        ones, whichever is larger: the response is the error of float32 additions in any order

Operators that are chains of simpler ones (COMPOSITE: softmax, norms, activations) are taken apart in B, because numbers
may cancel inside. Where they do, a kernel may compute both numbers again, in another way: a difference that vanishes is
disturbed by a unit roundoff of its numbers, a softmax by one of the logarithm that exp(x - s) subtracts, and in C the
gradient of a softmax by the error of the sums that it averages. Operators that move or select numbers round nothing and
are not disturbed (EXACT). What the reference casts, as by `x.float()`, stays float64.

From responses to a bound
    Rounding errors are d_i = u v_i e_i with |e_i| <= 1, one for each number v_i that was rounded. To first order an
    output changes by sum_i (dy/dv_i) d_i. With e_i = +1 or -1 at random, the mean square of that change over several
    runs (probes) estimates R^2 = u^2 sum_i ((dy/dv_i) v_i)^2.
      - True rounding errors are smaller: e_i uniform in [-1, 1] has standard deviation 1 / sqrt(3), so 3 R is five
        standard deviations. In a chain of m operators the largest error possible is sqrt(m) R: 3 R covers nine.
      - Equal numbers have equal rounding errors, which add up instead of averaging out. So in half of the probes the
        sign is a function of the number itself; in the others it is drawn for each element, which also breaks ties.
      - A mean square over 16 probes scatters. Below half of what is typical for its tensor, in units of |r|, it is
        raised to that half: then 3 R covers a chain of two operators even if their signs differ in all probes.
    Hence, with u the unit roundoff of the dtype and n the number of elements,
        |y - r| <= u |r| + 3 R_A + max(2 log2(n) 2^-24 S, 2.1 R_C) + 2^-23 max S + tiny,     S = R_B 2^24
    The third term is that of gate G1, wide enough for 8 probes. max S is the largest S of the tensor, 0 where S = 0:
    another formula than the reference's may subtract, in float32, numbers as large as those of other elements (the
    gradient of a softmax, where one probability is nearly 1 and others are not); 2^-23 are the roundings of gate
    G2's floor. Large cases have fewer probes, down to 4, whose mean scatters more: 3 becomes 3 sqrt(16 / probes).

    The third term covers sums in pairs or blocks, and short ones. One after the other, in the worst order, the partial
    sums s_k of n terms are as large as P = (sum |x| + |sum x|) / 2, and each is rounded: the error is at most n u P, to
    first order (Higham 2002, section 4.2, with sum |x|). Roundings of different numbers average out: the errors of
    0.42 u |s_k| add up as squares, to 0.42 sqrt(n) u P at most (Higham and Mary 2019). 2.1 R_C are five times that. c
    terms that differ by less than the last place of the sum, as those of a saturated sigmoid, are rounded alike: for
    them C takes c in place of sqrt(n) (`sums`).

    A sum that the reference adds up one term at a time in 16 bits, as the gradient of `weight[index]` is, may have its
    terms in any order: A has the error of C, in units of the dtype. Other operators round inside where no probe
    reaches: 2 |p - r| is allowed at least (gate G2); of interpolations (INSIDE), the largest of the tensor.

    R is a root of a sum of squares, the S of a spec is a sum. S is at most R times the root of the number of terms, so
    for sums of many terms this gate is tighter: see docs/judge.md. It is looser for a chain that a kernel rounds once.

Discontinuities
    At a tie or a threshold a rounding decides between two results (top-k, argmax, comparisons). An integer that changes
    in any probe is not compared beyond its range (`flips`); 20 more probes see to ties. A float that changes by more
    than 64 units roundoff of the larger of itself and its tensor's root mean square (`jumps`) has a wide bound by
    itself, and does not enter the statistics of gates G2 and G3. One that is finite in the truth and infinite or NaN in
    a probe may be either (`other`: the probability at which a filter begins); one that is infinite or NaN in the truth
    and otherwise in a probe is not compared: of 1 / (1 - sigmoid(40)) float64 knows no digit.

    Where the reference chooses among numbers, or has a kink, two more probes break every tie, to either side; gradients
    that jump at one of equal numbers may do so at each (`choices`). Choices distinct in every probe must be so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from conformance.tolerances.bounds import SHARED, Arithmetic
from conformance.tolerances.chains import COMPOSITE, INSIDE
from conformance.tolerances.choices import CHOOSING, of_equals, without_ties
from conformance.tolerances.disturbance import Disturbed, Order, Reordered, Widened
from conformance.tolerances.integers import all_distinct
from conformance.tolerances.narrow import Narrow, narrow_of
from conformance.tolerances.sums import CHAINS, SUMS
from unsloth_ref.accuracy import G2_MAX, ROUNDING_RMS, UNIT_FLOAT32, float32_error, is_float, widen, widen_float8

PROBES_A, PROBES_B, PROBES_C, PROBES_OF_TIES = 16, 8, 4, 20
FEWEST_PROBES, WORK = 4, 2**21  # for large cases: so many elements in all probes, but at least so many probes
FACTOR_A, FACTOR_C = 3.0, 5 * ROUNDING_RMS
JUMP = 64
MAX_FLOAT32 = torch.finfo(torch.float32).max
KEPT = 8  # measured conditions: layouts of a case have the same elements
Tensors = dict[str, Tensor]
Again = Callable[[Tensors, Sequence[Tensor]], Tensors]


@dataclass(frozen=True)
class Response:
    """The truth of one output or gradient, and how it responds to roundings.

    Attributes:
        truth: the reference in float64.
        terms: S, float64.
        extra: 3 R_A, float64.
        sums: R_C, float64.
        spread: the part of max S in the bound, float64.
        flips: elements that some probe changed, for integers and booleans.
        lowest, highest: the range of integers in all probes, at least that of places in an input.
        distinct: whether the integers of each row differ from each other, in the truth and in all probes.
        jumps: elements that some probe changed by far more than roundings do.
        other: the truth, or what a probe makes of it where one of both is infinite or NaN and the other is not so.
        inside: whether an operator of INSIDE was run.
        of_peer: 2 |p - r|, float64; None without a peer.
    """

    truth: Tensor
    terms: Tensor
    extra: Tensor
    sums: Tensor
    spread: Tensor
    flips: Tensor
    lowest: float
    highest: float
    distinct: bool
    jumps: Tensor
    other: Tensor
    inside: bool
    of_peer: Tensor | None = None

    def beside(self, peer: Tensor) -> Response:
        """The same response, beside the run of the reference in the dtype under test."""
        error = (peer.double() - self.truth).abs().nan_to_num(0.0, 0.0, 0.0)
        return replace(self, of_peer=G2_MAX * (error.max() if self.inside and error.numel() else error))

    def largest(self, how: Arithmetic) -> Tensor:
        """Bound of the absolute error; twice R_A where casts truncate."""
        truncated = 2.0 if how.unit > torch.finfo(torch.bfloat16).eps / 2 else 1.0
        in_float32 = torch.maximum(float32_error(how.elements) * self.terms, FACTOR_C * self.sums)
        measured = in_float32 + truncated * self.extra + self.spread
        return measured if self.of_peer is None else torch.maximum(measured, self.of_peer)

    def independent(self, how: Arithmetic) -> Tensor:
        """Root mean square of the roundings to the dtype, and of those of long sums."""
        return ROUNDING_RMS * torch.hypot(self.extra / FACTOR_A, self.sums)

    def shared(self) -> Tensor:
        """Float32 roundings of a whole row."""
        return SHARED * self.terms

    def scale(self, how: Arithmetic) -> Tensor:
        """Unit of a mean error."""
        return how.unit * self.terms


def measured(
    again: Again, inputs: Tensors, grad_outputs: Sequence[Tensor], dtype: torch.dtype, key: Any, work: int = WORK
) -> dict[str, Response]:
    """The truth and the response to roundings of every output and gradient.

    Args:
        again: runs the reference on inputs and incoming gradients; returns outputs and gradients by name.
        inputs: in the dtype under test.
        grad_outputs: likewise.
        dtype: under test.
        key: what else the results depend on: they are kept for the next call with the same key and elements.
        work: elements in all probes, for cases with more than a few; 0 for the fewest probes.
    """
    full = (key, dtype, *(_digest(tensor) for tensor in (*inputs.values(), *grad_outputs)))
    if full not in _kept:

        def widened(tensors: Tensors, gradients: Sequence[Tensor]) -> Tensors:
            return {name: _of_float8(r) for name, r in again(tensors, gradients).items()}

        _kept[full] = _measured(widened, inputs, grad_outputs, dtype, work)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return _kept[full]


_kept: OrderedDict[Any, dict[str, Response]] = OrderedDict()


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().view(integer).reshape(-1).long()
    weights = (2 * torch.arange(flat.numel(), device=flat.device) + 1) * 0x2545F4914F6CDD1D
    return (*tensor.shape, tensor.dtype, int(((flat ^ (flat >> 7)) * weights).sum()))


class _Changes:
    """Adds up how results change from probe to probe."""

    def __init__(self, truth: Tensors, unit: float, last_place: float) -> None:
        """Start with the truth, the unit roundoff under test, and the largest place in an input."""
        self.truth, self._unit = {name: _within_float32(r) for name, r in truth.items()}, unit
        self.flips = {name: torch.zeros_like(r, dtype=torch.bool) for name, r in truth.items()}
        self.jumps = {name: flip.clone() for name, flip in self.flips.items()}
        self.others = dict(self.truth)
        self.distinct = {n: not r.is_floating_point() and all_distinct(r) for n, r in truth.items()}
        self.ranges = {
            name: (min(_extreme(r, min), 0.0), max(_extreme(r, max), last_place)) for name, r in truth.items()
        }

    def zeros(self) -> Tensors:
        """Squares of changes, before any."""
        return {name: torch.zeros_like(r, dtype=torch.float64) for name, r in self.truth.items()}

    def add(self, found: Mapping[str, Tensor], squares: Tensors | None, probes: int, jumps: bool = True) -> None:
        """Add the results of one of so many probes; without squares, only integers."""
        for name, r in self.truth.items():
            if found[name].shape != r.shape:
                self.flips[name].fill_(True)
            elif not r.is_floating_point():
                self.flips[name] |= found[name] != r
                self.distinct[name] &= all_distinct(found[name])
                low, high = self.ranges[name]
                self.ranges[name] = min(low, _extreme(found[name], min)), max(high, _extreme(found[name], max))
            elif squares is not None:
                within = _within_float32(found[name])
                alike = (within == r) | (within.isfinite() & r.isfinite()) | (within.isnan() & r.isnan())
                self.others[name] = torch.where(alike, self.others[name], within)
                change = torch.where(found[name] == r, 0.0, found[name] - r)
                level = torch.maximum(r.abs(), r.where(r.isfinite(), nan).square().nanmean().sqrt()) if r.numel() else r
                self.jumps[name] |= jumps & ~(change.abs() <= JUMP * self._unit * level)
                squares[name] += change.nan_to_num(0.0, 0.0, 0.0).clamp(-MAX_FLOAT32, MAX_FLOAT32).square() / probes


def _measured(
    again: Again, inputs: Tensors, grad_outputs: Sequence[Tensor], dtype: torch.dtype, work: int
) -> dict[str, Response]:
    wide = {name: widen(tensor) for name, tensor in inputs.items()}
    gradients = [widen(gradient) for gradient in grad_outputs]
    with Order() as order:
        truth = again(wide, gradients)
    unit = torch.finfo(dtype).eps / 2
    changes = _Changes(truth, unit, max((n for t in inputs.values() for n in t.shape), default=1) - 1.0)
    square_a, square_b = changes.zeros(), changes.zeros()
    elements = max(tensor.numel() for tensor in (*inputs.values(), *truth.values()))
    probes_a, probes_b = (max(FEWEST_PROBES, min(n, work // max(1, elements))) for n in (PROBES_A, PROBES_B))
    for disturbed in _computed(wide, gradients, probes_b):
        changes.add(disturbed.results(again), square_b, probes_b)
    if CHOOSING & set(order.names):
        for tensors in without_ties(wide, UNIT_FLOAT32):
            with Widened():
                found = again(tensors, gradients)
            # Places and gradients alone: numbers near 0 are no ties for an operation that divides by the largest.
            chosen = {n for n, r in truth.items() if n.startswith("gradient") or r.dtype == torch.int64}
            changes.add({n: found[n] if n in chosen else r for n, r in truth.items()}, square_b, probes_b)
    if any(not r.is_floating_point() for r in truth.values()):  # ties must break in some probe
        for disturbed in _computed(wide, gradients, PROBES_OF_TIES, by_element=True):
            changes.add(disturbed.results(again), None, 1)
    narrow = Narrow([], set(), set()) if unit == UNIT_FLOAT32 else narrow_of(again, inputs, grad_outputs, order, truth)
    for disturbed in _rounded(wide, gradients, narrow, dtype, probes_a):
        changes.add(disturbed.results(again), square_a, probes_a)
    square_c = changes.zeros()
    for seed in range(PROBES_C if (SUMS | CHAINS | COMPOSITE) & set(order.names) else 0):
        mode = Reordered(UNIT_FLOAT32, torch.finfo(torch.float32).tiny * UNIT_FLOAT32, seed)
        results = _Probe(mode, wide, gradients).results(again)
        if not mode.found:
            break
        changes.add(results, square_c, PROBES_C, jumps=False)  # an order may change a sum by more than that
    for name, tensor in inputs.items():
        if (key := f"gradient of {name}") in truth and changes.jumps[key].any():
            squares = square_a[key], square_b[key]
            changes.jumps[key], (square_a[key], square_b[key]) = of_equals(tensor, changes.jumps[key], squares)
    terms = {name: _typical(square.sqrt() / UNIT_FLOAT32, changes.truth[name]) for name, square in square_b.items()}
    factor = FACTOR_A * (PROBES_A / probes_a) ** 0.5
    return {
        name: Response(
            truth=r,
            terms=terms[name],
            extra=factor * _typical(square_a[name].sqrt(), changes.truth[name]),
            sums=square_c[name].sqrt(),
            spread=SHARED * _largest(terms[name]),
            flips=changes.flips[name],
            lowest=changes.ranges[name][0],
            highest=changes.ranges[name][1],
            distinct=changes.distinct[name],
            jumps=changes.jumps[name],
            other=changes.others[name],
            inside=bool(INSIDE & set(order.names)),
        )
        for name, r in truth.items()
    }


@dataclass(frozen=True)
class _Probe:
    mode: Disturbed
    inputs: Tensors
    gradients: Sequence[Tensor]

    def results(self, again: Again) -> Tensors:
        """The results of the disturbed reference; for B its attention is a chain of operators, backwards too."""
        with self.mode, sdpa_kernel(SDPBackend.MATH) if self.mode.inside else nullcontext():
            return again(self.inputs, self.gradients)


def _computed(wide: Tensors, gradients: Sequence[Tensor], probes: int, by_element: bool = False) -> Iterator[_Probe]:
    """The probes of B: every operator in float32."""
    for seed in range(0, 2 * probes, 2) if by_element else range(probes):
        mode = Disturbed(lambda place: UNIT_FLOAT32, torch.finfo(torch.float32).tiny * UNIT_FLOAT32, seed, inside=True)
        inputs = {n: mode.disturbed(t, UNIT_FLOAT32, -1 - i) for i, (n, t) in enumerate(wide.items())}
        yield _Probe(mode, inputs, [mode.disturbed(g, UNIT_FLOAT32, -101 - i) for i, g in enumerate(gradients)])


def _rounded(
    wide: Tensors, gradients: Sequence[Tensor], narrow: Narrow, dtype: torch.dtype, probes: int
) -> Iterator[_Probe]:
    """The probes of A, roundings to 16 bits; none if nothing is rounded to 16 bits."""
    unit = torch.finfo(dtype).eps / 2
    flags = [flag and place not in narrow.last for place, flag in enumerate(narrow.flags)]
    if not any(flags) and not narrow.inputs:
        return
    smallest = torch.finfo(dtype).smallest_normal * unit
    for seed in range(probes):
        mode = Disturbed(lambda p: unit if p >= len(flags) or flags[p] else 0.0, smallest, seed, inside=False)
        inputs = {name: mode.disturbed(t, unit, -1) if name in narrow.inputs else t for name, t in wide.items()}
        yield _Probe(mode, inputs, gradients)


def _within_float32(r: Tensor) -> Tensor:
    """The numbers that float32 has; larger ones are infinite in every kernel, and no measure of the others' errors."""
    return torch.where(r.abs() <= MAX_FLOAT32, r, r * inf) if r.is_floating_point() else r


def _largest(terms: Tensor) -> Tensor:
    """The largest term of a tensor, for each element that has any."""
    finite = terms.nan_to_num(0.0, 0.0, 0.0)
    return torch.where(terms > 0, finite.max() if finite.numel() else 0.0, 0.0)


def _extreme(r: Tensor, which: Callable[..., Any]) -> float:
    """The smallest or largest integer of a tensor."""
    if r.is_floating_point() or not r.numel():
        return 0.0
    return float((r.amin if which is min else r.amax)())


def _typical(response: Tensor, r: Tensor) -> Tensor:
    """The response, raised to at least half of the value, in units of |r|, that is typical for the tensor."""
    size = r.double().abs().nan_to_num(0.0, 0.0, 0.0)
    if not size.any():
        return response
    usual = (response / size)[size > size.max() * UNIT_FLOAT32].median()  # not where results underflow
    return torch.maximum(response, usual / 2 * size)


def _of_float8(result: Tensor) -> Tensor:
    return result if is_float(result) else widen(widen_float8(result))

"""NaN and infinity propagate only where the formulas propagate them; an ignored row gives exactly zero.

Autograd multiplies a gradient of 0 by NaN. Where the outputs of a row are finite, a gradient of 0 is as good.

Of an operation of the command line, a single NaN among the elements of an input or of an incoming gradient must reach
every result that depends on it: one that changes in the reference if the element becomes another number. Other
results may be NaN too, as those of a product with zeros, and a kernel may refuse NaN. A gradient may be 0 where the
formulas limit numbers: no comparison with NaN is true. Where all elements of an input but the last of each row are
-infinity, as under a mask, an output must be a number where the reference's is one. Numbers may all be far from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, nan

import torch
from torch import Tensor

from conformance.case import Case
from conformance.properties.layouts import naming
from conformance.property import Property, of_file
from conformance.spec import Inputs
from conformance.tolerances.disturbance import Order, Widened
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial
from unsloth_ref.accuracy import is_float, widen

PLACES = (0.0, 0.5, 1.0)  # the start, the middle and the end of each dimension
# Numbers in place of NaN. Whether a result depends on them is decided between two that are close.
OTHERS = ((4.0, 3.0), (0.3, 0.2), (-2.0, -1.5))
# Operators that take NaN for the largest number: the largest of OTHERS stand for it; a 0 may be what is not selected.
SELECTING = {"topk", "sort", "argsort", "argmax", "argmin", "kthvalue", "median", "mode", "max", "min"}
OFFSET = 4.0
DISTINCT, LOWEST_POWER = 23, 103  # 2^103 is 10^31, and some numbers of 2^125 can be added up
CHANGE, OF_LARGEST = 1e-3, 1e-6  # of a result that depends on an element: relative to itself, and to the largest


def check(trial: Trial, case: Case) -> float | None:
    """Put each special value at the start, in the middle and at the end of each row-wise input; NaN into every one."""
    used = max(_at_every_place(trial, case) for case in dict.fromkeys((case, trial.rowwise(case))))
    if trial.spec.budget.measured:
        _demand_spread(trial, case)
        _demand_numbers(trial, case)
        used = max(used, _far_away(trial, case))
    return used if trial.spec.rowwise else None


def _at_every_place(trial: Trial, case: Case) -> float:
    used = 0.0
    for name in trial.spec.rowwise:
        for value in trial.spec.special_values:
            for fraction in PLACES:
                inputs = trial.inputs(case)
                if not inputs[name].is_floating_point():
                    continue
                inputs[name][_place(inputs[name], fraction)] = value
                # Infinity times a zero derivative depends on how a formula is written: judge the forward pass alone.
                grads = trial.spec.grads if value != value else ()
                peer = trial.run(case, inputs, function=trial.spec.reference, grads=grads)
                run = _with_nan_for_zeros(trial.run(case, inputs, grads=grads), peer, trial.spec.rowwise)
                used = max(used, trial.judge(case, run, inputs, peer=peer))
    return used


def _place(tensor: Tensor, fraction: float) -> tuple[int, ...]:
    return tuple(int(fraction * (size - 1) + 0.5) for size in tensor.shape)


def _with_nan_for_zeros(run: Run, peer: Run, rowwise: Sequence[str]) -> Run:
    """The run with NaN in the gradients of rows that are 0, although NaN, beside finite outputs of the reference."""
    grads = dict(run.grads)
    for name in (name for name in rowwise if name in grads):
        gradient, wanted = grads[name], peer.grads[name]
        if gradient.shape == wanted.shape and all(y.shape[:1] == gradient.shape[:1] for y in peer.outputs):
            quiet = torch.stack([_of_rows(y.isfinite()) for y in peer.outputs] + [_of_rows(gradient == 0)]).all(0)
            quiet = quiet.view(-1, *(1,) * (gradient.ndim - 1))
            grads[name] = gradient.masked_fill(quiet & wanted.isnan(), nan)
    return replace(run, grads=grads)


def _of_rows(flags: Tensor) -> Tensor:
    return flags.reshape(len(flags), -1).all(1)


@dataclass(frozen=True)
class _Arguments:
    """The tensors of a call: inputs and incoming gradients."""

    inputs: Inputs
    gradients: Sequence[Tensor]

    def wide(self) -> _Arguments:
        """In float64."""
        return _Arguments({n: widen(t) for n, t in self.inputs.items()}, [widen(g) for g in self.gradients])


@dataclass(frozen=True)
class _Element:
    """One element of one argument; `put` returns the arguments with another number there."""

    words: str
    put: Callable[[float], _Arguments]


def _elements(trial: Trial, case: Case) -> Iterator[_Element]:
    """Elements of all arguments."""
    inputs = trial.inputs(case)
    gradients = trial.grad_outputs(case, trial.run(case, inputs, function=trial.spec.reference, grads=()).outputs)

    def replaced(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
        copy = tensor.clone()
        copy[place] = value
        return copy

    for place, name in ((_place(t, f), n) for n, t in inputs.items() if is_float(t) and t.numel() for f in PLACES):
        yield _Element(
            f"{name} is NaN at index {place}",
            lambda value, name=name, place=place: _Arguments(
                {**inputs, name: replaced(inputs[name], place, value)}, gradients
            ),
        )
    for place, index in (
        (_place(g, f), i) for i, g in enumerate(gradients) if is_float(g) and g.numel() for f in PLACES
    ):
        yield _Element(
            f"the gradient of output {trial.spec.outputs[index]} is NaN at index {place}",
            lambda value, index=index, place=place: _Arguments(
                inputs, [replaced(g, place, value) if i == index else g for i, g in enumerate(gradients)]
            ),
        )


def _demand_spread(trial: Trial, case: Case) -> None:
    """Raise Failure if a result is finite where a NaN among the arguments should have reached it."""

    def run(arguments: _Arguments, reference: bool = True) -> Run | None:
        function = trial.spec.reference if reference else None
        try:
            return trial.run(case, arguments.inputs, function=function, grad_outputs=arguments.gradients)
        except Failure:
            return None  # NaN, or another number there, is refused

    def exact(arguments: _Arguments) -> Run | None:
        with Widened():  # a cast to float32 within would leave noise where terms cancel
            return run(arguments.wide())

    with Order() as order:
        trial.run(case, {n: widen(t) for n, t in trial.inputs(case).items()}, function=trial.spec.reference)
    selects = bool(SELECTING & set(order.names))
    pairs = OTHERS[:1] if selects else OTHERS
    for element in _elements(trial, case):
        found, peer, truth = run(element.put(nan), False), run(element.put(nan)), exact(element.put(nan))
        others = [exact(element.put(value)) for pair in pairs for value in pair]
        if found is None or peer is None or truth is None:
            continue
        every = zip(*(each.named(trial.spec) for each in (found, peer, truth)), strict=True)
        for place, ((_, name, y), (_, _, p), (_, _, r)) in enumerate(every):
            if not is_float(p) or not y.shape == p.shape == r.shape:
                continue
            changed = [None if other is None else other.named(trial.spec)[place][2] for other in others]
            depends = [_differ(one, two, r) for one, two in zip(changed[::2], changed[1::2], strict=True)]
            cut = selects or (order.cuts and name.startswith("gradient"))
            number = y.isfinite() & ((y != 0) | (not cut))
            swallowed = number & p.isnan() & r.isnan() & torch.stack(depends).any(0)
            if swallowed.any():
                index = tuple(swallowed.nonzero()[0].tolist())
                raise Failure(
                    f"{element.words}: {name} is {float(y[index])!r} at index {index}, should be NaN\n"
                    f"{int(swallowed.sum())} elements that depend on that number are finite"
                )


def _demand_numbers(trial: Trial, case: Case) -> None:
    """Raise Failure if an output is NaN where it should be a number: a kernel's first tiles hold -infinity alone.

    Only where an offset means nothing to the formulas, as to those in which a mask adds -infinity, and where the output
    depends on the elements that are -infinity: a product of one and 0 may be NaN.
    """
    inputs, reference = trial.inputs(case), trial.spec.reference

    def run(name: str, value: float, function: Callable[..., object] | None = None) -> tuple[Tensor, ...]:
        masked = inputs[name].clone()
        masked[..., :-1] = value
        return trial.run(case, {**inputs, name: masked}, function=function, grads=()).outputs

    for name in (name for name, tensor in inputs.items() if is_float(tensor) and tensor.ndim and tensor.shape[-1] > 1):
        if not _is_offset(trial, case, inputs, name):
            continue
        try:
            found, *runs = run(name, -inf), *(run(name, value, reference) for value in (-inf, *OTHERS[0]))
        except Failure:
            continue  # infinity is refused
        for output, y, p, one, two in zip(trial.spec.outputs, found, *runs, strict=True):
            if is_float(p) and y.shape == p.shape:
                lost = y.isnan() & p.isfinite() & _differ(one, two, p)
                if lost.any():
                    index = tuple(lost.nonzero()[0].tolist())
                    raise Failure(
                        f"{name} is -infinity but for the last element of each row: {output} is NaN at index {index},"
                        f" should be {float(p[index])!r}"
                    )


def _far_away(trial: Trial, case: Case) -> float:
    """Judge outputs on numbers that are all low, or all high; very low where an offset means nothing to the formulas.

    There, as in a softmax, a logarithm of a sum of exponentials or a maximum, a kernel may start or pad with a number
    that is not the lowest. Not where plain PyTorch itself overflows, or loses the differences in a mean. Of outputs of
    several floating-point inputs, whose roundings beside such numbers are large, only whether they are finite.
    """
    case = replace(trial.spec.case(3, 17), seed=case.seed)
    inputs, used = trial.inputs(case), 0.0
    alone = sum(map(is_float, inputs.values())) == 1
    for name, tensor in inputs.items():
        if not is_float(tensor) or not tensor.numel():
            continue
        places = 7 * torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device) % DISTINCT
        distances = [2.0**14 * (1 + places / DISTINCT)]
        if trial.dtype != torch.float16 and _is_offset(trial, case, inputs, name):
            distances.append(2.0 ** (LOWEST_POWER + places))  # powers of 2, whose multiples are exact
        for word, numbers in ((word, sign * one) for one in distances for word, sign in (("low", -1), ("high", 1))):
            far = {**inputs, name: numbers.view(tensor.shape).to(tensor.dtype)}
            try:
                peer, truth = trial.run(case, far, function=trial.spec.reference, grads=()), _exact(trial, case, far)
            except Failure:
                continue
            if all(_close(p, r) for p, r in zip(peer.outputs, truth, strict=True)):
                run = trial.run(case, far, grads=())
                with naming(f"in {' '.join(f'{n}={size}' for n, size in case.sizes)}, {name} is {word} everywhere"):
                    used = max(used, trial.judge(case, run, far, peer=peer)) if alone else used
                    _demand_finite(trial, run, peer)
    return used


def _exact(trial: Trial, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    with Widened():
        wide = {name: widen(tensor) for name, tensor in inputs.items()}
        return trial.run(case, wide, function=trial.spec.reference, grads=()).outputs


def _is_offset(trial: Trial, case: Case, inputs: Inputs, name: str) -> bool:
    """Whether an offset of an input leaves each output of the definition as it is, or moves it by as much."""
    try:
        usual, moved = (_exact(trial, case, {**inputs, name: widen(inputs[name]) + by}) for by in (0.0, OFFSET))
    except Failure:
        return False
    return all(_moved_by(OFFSET, one, other) for one, other in zip(usual, moved, strict=True))


def _demand_finite(trial: Trial, run: Run, peer: Run) -> None:
    for (_, output, y), p in zip(run.named(trial.spec), peer.outputs, strict=True):
        if y.shape == p.shape and is_float(p) and (y.isfinite() < p.isfinite()).any():
            raise Failure(f"{output} is not finite, as it should be")


def _moved_by(offset: float, one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal, or differ by this offset everywhere, but for roundings."""
    if one.shape != other.shape or not is_float(one):
        return one.shape == other.shape and one.equal(other)
    change = other - one
    return any(bool(((change - by).abs() <= 1e-9 * (offset + one.abs())).all()) for by in (0.0, offset))


def _close(p: Tensor, r: Tensor) -> bool:
    if p.shape != r.shape or not is_float(p):
        return p.shape == r.shape
    return bool(((p.double() - r).abs() <= 0.01 * r.abs()).all())


def _differ(one: Tensor | None, other: Tensor | None, r: Tensor) -> Tensor:
    """Which elements of two runs differ by more than what roundings change; none if a run raised."""
    if one is None or other is None or not one.shape == other.shape == r.shape or not r.numel():
        return torch.zeros_like(r, dtype=torch.bool)
    size = torch.maximum(one.abs(), other.abs()).nan_to_num(0.0, 0.0)
    return (size > OF_LARGEST * size.max()) & ((one - other).abs() > CHANGE * size)


PROPERTY = Property(
    *of_file(check),
    share=0.2,
    exempt=lambda spec: (
        "" if spec.rowwise or spec.budget.measured else "no input is declared to have independent rows"
    ),
)

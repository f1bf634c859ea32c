"""How far may a result be from the reference, where no spec of the operation says so? As far as its inputs' roundings.

Each result of an operation, an output or a gradient, is compared as unsloth_ref/accuracy.py says: y with the truth r
and the peer p. The floors are measured: the reference runs once more in float64, on disturbed inputs, and computes r'.

    0.42 u ||r|| + ||r' - r||         the floor of the root mean square error
    u max |r| + max |r' - r|          the floor of the largest error

u is the unit roundoff of y, and 0.42 u |r| the root mean square of its last rounding. r' - r shows what roundings of
the inputs can do to the result: each element of each input, incoming gradients included, is multiplied by 1 + d or
1 - d at random. d is one unit in the last place; in float32 it is 2 log2(n) 2^-24 if that is more, by which sums of n
elements in another order may differ. So small a d could leave every rounding as it was. Inputs are therefore disturbed
by 2^-12 at least, and r' - r is scaled down.

The peer of a result of few elements, such as a loss, can be exact by chance. Of such a result only the largest error is
compared, with three times the root mean square of |p - r| and |r' - r| over eight runs, each disturbed anew.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from unsloth_ref.accuracy import (
    ROUNDING_RMS,
    Comparison,
    against_peer,
    float32_error,
    is_float,
    is_statistic,
    unit_roundoff,
    widen,
)

RUNS, STANDARD_DEVIATIONS = 8, 3.0  # for a result of few elements
SMALLEST_DISTURBANCE = 2.0**-12

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], list[Tensor]]


def comparisons(found: Sequence[Tensor | None], inputs: Tensors, run: Run) -> Iterator[Comparison]:
    """For each result of an operation the inequality that uses most of its budget.

    Args:
        found: the results, of any shape and floating-point dtype; None for a missing one.
        inputs: all that they depend on, incoming gradients included, by name.
        run: computes the results by the reference, on such inputs in any dtype.
    """
    reference = _Reference(inputs, run)
    for place, (y, r, p) in enumerate(zip(found, reference.truth, reference.peer, strict=True)):
        wrong = _structure(y, r, p)
        if y is None:  # no gradient means a gradient of 0
            yield Comparison(wrong, 1.0, math.inf if bool(r.any()) else 0.0, 0.0, 0.0)
            continue
        if wrong:
            yield Comparison(wrong, 1.0, math.inf, 0.0, 0.0)
            continue
        finite = y.isfinite() & r.isfinite() & p.isfinite()
        truth, error = r[finite], (y.double() - r)[finite]
        if not error.numel():
            yield Comparison("largest", 1.0, 0.0, 0.0, 0.0)
        elif is_statistic(truth, error):
            change = reference.change(place)[finite].nan_to_num()
            yield _of_many(y.dtype, truth, error, (p.double() - r)[finite], change)
        else:
            peer_errors, changes = (several[:, finite].nan_to_num() for several in reference.several(place))
            yield _of_few(y.dtype, truth, error, peer_errors, changes)


class _Reference:
    """The reference on the inputs of one call, and on disturbed inputs where a result needs it.

    Attributes:
        truth: the results in float64.
        peer: the results in the dtypes of the inputs.
    """

    def __init__(self, inputs: Tensors, run: Run) -> None:
        self._inputs, self._run = inputs, run
        self.truth, self.peer = run(_widened(inputs)), run(inputs)
        elements = max((tensor.numel() for tensor in (*inputs.values(), *self.truth)), default=1)
        floats = [tensor for tensor in inputs.values() if is_float(tensor)]
        self._scale = max(_meant_disturbance(tensor, elements) / _disturbance(tensor) for tensor in floats)
        self._generator = torch.Generator(next(iter(inputs.values())).device).manual_seed(0)
        self._changes: list[list[Tensor]] = []  # r' - r of each run on disturbed inputs
        self._errors = [[p.double() - r for p, r in zip(self.peer, self.truth, strict=True)]]  # first the undisturbed

    def change(self, place: int) -> Tensor:
        """r' - r of one result, in its shape, float64."""
        if not self._changes:
            self._disturb()
        return self._changes[0][place]

    def several(self, place: int) -> tuple[Tensor, Tensor]:
        """p - r of one result without and with disturbances, and r' - r, each [runs, shape of the result], float64."""
        while len(self._errors) <= RUNS:
            disturbed, truth = self._disturb()
            peer = self._run(disturbed)
            self._errors.append([p.double() - r for p, r in zip(peer, truth, strict=True)])
        errors, changes = (torch.stack([run[place] for run in runs]) for runs in (self._errors, self._changes))
        return errors, changes

    def _disturb(self) -> tuple[Tensors, list[Tensor]]:
        """Disturb the inputs anew and keep r' - r; the inputs and r'."""
        disturbed = {key: _disturbed(tensor, self._generator) for key, tensor in self._inputs.items()}
        truth = self._run(_widened(disturbed))
        self._changes.append([self._scale * (there - here) for there, here in zip(truth, self.truth, strict=True)])
        return disturbed, truth


def _of_many(dtype: torch.dtype, r: Tensor, error: Tensor, peer_error: Tensor, change: Tensor) -> Comparison:
    """The inequality that uses more, of a result of many elements; all tensors float64, [n].

    Args:
        dtype: of the result.
        r: the truth.
        error: of the result.
        peer_error: p - r.
        change: r' - r.
    """
    unit, tiny = unit_roundoff(dtype), _tiny(dtype)
    rms = float(ROUNDING_RMS * unit * r.norm() + change.norm()) + tiny * r.numel() ** 0.5
    largest = float(unit * r.abs().max() + change.abs().max()) + tiny
    return max(against_peer(error, peer_error, (rms, largest)), key=lambda one: one.used)


def _of_few(dtype: torch.dtype, r: Tensor, error: Tensor, peer_errors: Tensor, changes: Tensor) -> Comparison:
    """The inequality of the largest error, of a result of few elements; `peer_errors` and `changes` are [runs, n]."""
    peer, change = (STANDARD_DEVIATIONS * runs.square().mean(0).sqrt() for runs in (peer_errors, changes))
    largest = float(unit_roundoff(dtype) * r.abs().max() + change.max()) + _tiny(dtype)
    return against_peer(error, peer, (math.inf, largest))[1]


def _tiny(dtype: torch.dtype) -> float:
    """A step of the dtype's subnormal numbers, at least the smallest normal float32: an error that always may be."""
    limits = torch.finfo(dtype)
    return max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).tiny)


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


def _meant_disturbance(tensor: Tensor, elements: int) -> float:
    """d: one unit in the last place, relative to 1, or what float32 sums of so many elements may be off by."""
    return max(torch.finfo(tensor.dtype).eps, float32_error(elements))


def _disturbance(tensor: Tensor) -> float:
    """d, not so small that all roundings stay as they were."""
    return max(torch.finfo(tensor.dtype).eps, SMALLEST_DISTURBANCE)


def _disturbed(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Each floating-point number moved up or down, in the dtype of the tensor; other tensors as they are."""
    if not is_float(tensor):
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device, dtype=torch.int8) * 2 - 1
    return (tensor.double() * (1 + _disturbance(tensor) * signs)).to(tensor.dtype)

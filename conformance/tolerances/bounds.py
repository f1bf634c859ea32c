"""How far off a result may be before its last rounding: what a spec declares, and how bounds follow a computation.

A spec declares for each result either the terms that are added up or a bound of the error. The gates ask both for the
same four things, in the absolute error of the result:

    largest      no correct result exceeds it
    independent  the root mean square of the roundings to the dtype that the contract allows: they differ from element
                 to element, and those of many terms partly cancel
    shared       float32 roundings that a whole row may share, which do not average out
    scale        the unit in which a mean error is measured, where the result is smaller

Terms
    A result is a sum of terms t that are rounded `roundings` times to a dtype with unit roundoff u, in float32
    arithmetic on numbers of another size F (the same, if nothing else is said):

        largest      roundings u (1 + u) S + 2 log2(n) 2^-24 F,    S = sum |t|
        independent  sqrt(roundings) 0.42 u T,                      T = sqrt(sum t^2)
        shared       2^-23 F
        scale        u S, and the float32 part of `largest` where F is not S

    2 log2(n) 2^-24: pairwise summation of n terms has an error of at most log2(n) 2^-24 S (Higham 2002, section 4.2),
    and elementary functions have roundings of their own. The factor 2 allows longer sequential sums.
    0.42 u: a rounding to nearest of m 2^e, 1 <= m < 2, has a uniform error of at most u 2^e, and so a mean square of
    u^2 / (3 m^2) relative to the number: with m distributed as 1 / m, as products are, u^2 / (8 ln 2) on average.
    Independent roundings add as squares.
    2^-23: four roundings: a mean, a root, a reciprocal, a product.

Bound
    A number with a bound of its error, and the mean square of the error's independent parts. `exact`, `product`,
    `total`, `rounded`, `times`, `+` and `*` follow a computation. Where errors may be too large to follow derivatives,
    a spec constructs the Bound itself. A bound is whole: `roundings` and n of the arithmetic do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_ref.accuracy import ROUNDING_RMS, UNIT_FLOAT32, float32_error

SHARED = 2 * UNIT_FLOAT32


@dataclass(frozen=True)
class Arithmetic:
    """The numbers that turn terms into errors: the unit roundoff u of the result, its roundings, and n."""

    unit: float
    roundings: int
    elements: int


@dataclass(frozen=True)
class Terms:
    """The terms of a result, float64, broadcastable to it.

    Attributes:
        size: S, the sum of their absolute values. Where it is 0, the exact value is required.
        root: T, the root of the sum of their squares; None if it is S, as where nothing is added up.
        in_float32: F, the size of what is added up in float32; None if it is S.
    """

    size: Tensor
    root: Tensor | None = None
    in_float32: Tensor | None = None

    def over_rows(self) -> Terms:
        """The terms of a sum over rows, [..., columns] to [columns], from those of its elements."""
        root = self.size if self.root is None else self.root
        wide = None if self.in_float32 is None else as_rows(self.in_float32).sum(0)
        return Terms(as_rows(self.size).sum(0), as_rows(root).norm(dim=0), wide)

    def reshape(self, shape: Sequence[int]) -> Terms:
        """The same terms in another shape."""
        root, in_float32 = (None if t is None else t.reshape(shape) for t in (self.root, self.in_float32))
        return Terms(self.size.reshape(shape), root, in_float32)

    def largest(self, how: Arithmetic) -> Tensor:
        """Bound of the absolute error."""
        in_dtype, in_float32 = how.roundings * how.unit * (1 + how.unit), float32_error(how.elements)
        if self.in_float32 is None:
            return (in_dtype + in_float32) * self.size
        return in_dtype * self.size + in_float32 * self.in_float32

    def independent(self, how: Arithmetic) -> Tensor:
        """Root mean square of the roundings."""
        return how.roundings**0.5 * ROUNDING_RMS * how.unit * (self.size if self.root is None else self.root)

    def shared(self) -> Tensor:
        """Float32 roundings of a whole row."""
        return SHARED * (self.size if self.in_float32 is None else self.in_float32)

    def scale(self, how: Arithmetic) -> Tensor:
        """Unit of a mean error."""
        in_dtype = how.unit * self.size
        return in_dtype if self.in_float32 is None else in_dtype + float32_error(how.elements) * self.in_float32


def as_rows(tensor: Tensor) -> Tensor:
    """[..., columns] as [rows, columns]."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def lost(x: Tensor, moved: float | Tensor = 0.0) -> Tensor:
    """The error of a float32 sigmoid of x where exp(-x) overflows, relative, in roundings; 0 elsewhere.

    There it is all of the sigmoid: plain PyTorch's is 0. `moved` is how far roundings may have moved x.
    """
    return (x - moved < -math.log(torch.finfo(torch.float32).max)) / UNIT_FLOAT32


def root_of_mean(terms: Tensor) -> Tensor:
    """Root of the sum of squares of the terms of a row's mean, [..., columns] to [..., 1]."""
    return terms.norm(dim=-1, keepdim=True) / max(1, terms.shape[-1])


@dataclass(frozen=True)
class Bound:
    """A number that is computed with an error, float64.

    Attributes:
        value: without the error.
        error: bound of the absolute error.
        square: mean square of the error, if its parts are independent.
    """

    value: Tensor
    error: Tensor
    square: Tensor

    def __add__(self, other: Bound) -> Bound:
        """A sum of two numbers, not yet rounded."""
        return Bound(self.value + other.value, self.error + other.error, self.square + other.square)

    def __mul__(self, other: Bound) -> Bound:
        """A product of each two numbers, not yet rounded."""
        error = self.error * (other.value.abs() + other.error) + self.value.abs() * other.error
        square = self.square * other.value.square() + self.value.square() * other.square
        return Bound(self.value * other.value, error, square)

    def times(self, factor: float | Tensor) -> Bound:
        """The product with exact numbers, not yet rounded."""
        return Bound(factor * self.value, abs(factor) * self.error, factor**2 * self.square)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value, error and square."""
        return self.value, self.error, self.square

    def t(self) -> Bound:
        """The transposed matrix."""
        return Bound(*(part.t() for part in self.parts()))

    def reshape(self, shape: Sequence[int]) -> Bound:
        """The same numbers in another shape."""
        return Bound(*(part.reshape(shape) for part in self.parts()))

    def rounded(self, unit: float, smallest: float | Tensor) -> Bound:
        """Rounded to a dtype with this unit roundoff and smallest normal number."""
        size = self.value.abs()
        square = self.square + (ROUNDING_RMS * unit * size) ** 2 + (unit * smallest) ** 2 / 3  # uniform if subnormal
        return Bound(self.value, self.error + unit * (size + self.error) + unit * smallest, square)

    def largest(self, how: Arithmetic) -> Tensor:
        """Bound of the absolute error."""
        return self.error

    def independent(self, how: Arithmetic) -> Tensor:
        """Root mean square of the roundings, float32 ones included; the parts of a bound may not be independent."""
        return torch.minimum(self.square.sqrt(), self.error)

    def shared(self) -> Tensor:
        """Nothing beside the independent part."""
        return torch.zeros_like(self.error)

    def scale(self, how: Arithmetic) -> Tensor:
        """Unit of a mean error."""
        return self.error


def exact(value: Tensor) -> Bound:
    """A number without an error."""
    nothing = torch.zeros_like(value)
    return Bound(value, nothing, nothing)


def joined(bounds: Iterable[Bound], join: Callable[[tuple[Tensor, ...]], Tensor] = torch.cat) -> Bound:
    """Several numbers as one, by torch.cat, torch.stack or the like."""
    return Bound(*(join(parts) for parts in zip(*(bound.parts() for bound in bounds), strict=True)))


def added_in_float32(term: Bound, elements: int, additions: int = 0) -> Bound:
    """A number as a term of a float32 sum in a call on so many elements: the sum may round it at each step.

    With `additions` it is the first term, and that many small ones may be added to it one after the other.
    """
    size = term.value.abs()
    error = max(float32_error(elements), additions * UNIT_FLOAT32)
    root = max(SHARED, additions**0.5 * ROUNDING_RMS * UNIT_FLOAT32)
    return Bound(term.value, term.error + error * size, term.square + (root * size) ** 2)


def product(left: Bound, right: Bound, elements: int) -> Bound:
    """The matrix product left @ right, added up in float32, in a call on so many elements; not yet rounded."""
    size, other = left.value.abs(), right.value.abs()
    error = (left.error + float32_error(elements) * size) @ other + (size + left.error) @ right.error
    square = left.square @ other.square() + size.square() @ right.square + (SHARED * size @ other) ** 2
    return Bound(left.value @ right.value, error, square)


def total(terms: Bound, elements: int) -> Bound:
    """The float32 sum over the rows of a matrix, in a call on so many elements; not yet rounded."""
    ones = exact(torch.ones_like(terms.value[:, :1]).t())
    return product(ones, terms, elements).reshape(terms.value.shape[1:])

"""Runs in float64 whose operators are recorded, or disturbed as rounding errors would; `condition` says what for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from conformance.tolerances.chains import chain_of
from conformance.tolerances.sums import (
    CHAINS,
    LONG,
    OF_SUMS,
    SUMS,
    adds_one_by_one,
    error_of_sums,
    is_float64,
    name_of,
)
from unsloth_ref.accuracy import UNIT_FLOAT32

NARROW = (torch.float16, torch.bfloat16, torch.float32)
# Operators that move or select numbers, or make them without rounding.
EXACT = {
    "clone", "copy_", "copy", "cat", "stack", "index", "index_select", "gather", "where", "masked_fill",
    "masked_fill_", "masked_select", "select_backward", "slice_backward", "embedding", "neg", "neg_", "abs", "abs_",
    "sign", "relu", "relu_", "threshold_backward", "maximum", "minimum", "max", "min", "amax", "amin", "clamp",
    "clamp_", "clamp_min", "clamp_max", "sort", "topk", "fill", "fill_", "zero_", "zeros", "zeros_like", "ones",
    "ones_like", "full", "full_like", "empty", "empty_like", "empty_strided", "new_zeros", "new_ones", "new_full",
    "new_empty", "new_empty_strided", "arange", "scalar_tensor", "lift_fresh", "lift_fresh_copy", "detach", "alias",
    "flip", "roll", "repeat", "constant_pad_nd", "tril", "triu", "scatter", "scatter_", "slice_scatter",
    "select_scatter", "set_", "broadcast_in_dim", "floor", "ceil", "round", "trunc", "nan_to_num", "unbind", "split",
}  # fmt: skip
CASTS = ("_to_copy", "convert_element_type")
DIFFERENCES = ("sub", "rsub")
VANISHING = 2.0**-10  # three digits lost
LEAST_DIGITS = 2.0**-6
LIMITS = ("clamp", "clamp_min", "clamp_max", "minimum", "maximum", "hardtanh", "relu")
UNDERFLOWS = ("exp", "exp2", "sigmoid", "_softmax")


class Widened(TorchDispatchMode):
    """Operators that are asked for a narrower floating-point dtype compute in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator in float64."""
        args, kwargs = tuple(map(_wide, args)), {name: _wide(value) for name, value in (kwargs or {}).items()}
        return self.seen(func, self.run(func, args, kwargs), args)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator."""
        return func(*args, **kwargs)

    def seen(self, func: Any, found: Any, args: Any) -> Any:
        """The value that the operator returns."""
        return found


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def _is_view(func: Any) -> bool:
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def _has_empty(args: Any) -> bool:
    """Whether a tensor has no elements: simpler operators may then divide by their number, in Python."""
    return any(not one.numel() for one in tree_leaves(args) if isinstance(one, Tensor))


class Order(Widened):
    """Records the operators of a run in float64, and whose results no other operator reads.

    Attributes:
        names: of the operators in order, without casts and views.
        read: places of those whose results others read.
        sums: places of those that add up one by one.
        cuts: whether one limits floating-point numbers by a comparison, which is false of NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.read: set[int] = set()
        self.sums: set[int] = set()
        self.cuts = False
        self._maker: dict[int, int] = {}  # of the memory at an address
        self._alive: list[Tensor] = []  # so that no address is used twice

    def seen(self, func: Any, found: Any, args: Any) -> Any:
        """Append the name, except that of a cast."""
        if _is_view(func):
            return found
        name = name_of(func)
        self.cuts |= name in LIMITS and is_float64(found)
        read = args[1:] if name == "copy_" else args
        makers = {
            self._maker.get(t.untyped_storage().data_ptr(), -1) for t in tree_leaves(read) if isinstance(t, Tensor)
        }
        if name not in CASTS:
            self.names.append(name)
        if adds_one_by_one(func, args):
            self.sums.add(len(self.names) - 1)
        copies = name in (*CASTS, "clone", "copy_")
        if not copies and not name.startswith("new_") and not name.endswith("_like"):  # these read no elements
            self.read |= makers
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._maker[tensor.untyped_storage().data_ptr()] = (
                    max(makers, default=-1) if copies else len(self.names) - 1
                )
                self._alive.append(tensor)
        return found

    def last(self, result: Tensor) -> set[int]:
        """The place of the operator whose result this is and nothing else; empty if another operator reads it.

        Empty for a sum one by one too, whose last rounding is one of many.
        """
        return {self._maker.get(result.untyped_storage().data_ptr(), -1)} - self.read - self.sums


class Rounded(TorchDispatchMode):
    """Records the operators of a run in 16 bits, and what is rounded to 16 bits.

    Attributes:
        names: of the operators in order, without casts and views.
        narrow: whether the result of each is rounded, by itself or by a cast.
        inputs: addresses of tensors that are cast although no operator made them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.narrow: list[bool] = []
        self.inputs: set[int] = set()
        self._maker: dict[int, int] = {}  # of the memory at an address
        self._alive: list[Any] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; a cast to 16 bits rounds the result of the operator before it."""
        found = func(*args, **(kwargs or {}))
        if _is_view(func):
            return found
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]
        narrow = any(t.element_size() == 2 for t in made)
        if name_of(func) in CASTS:
            source = args[0].untyped_storage().data_ptr()
            if source in self._maker:
                place = self._maker[source]
                self.narrow[place] |= narrow
                self._keep(made, place)
            elif narrow:
                self.inputs.add(source)
            return found
        self.names.append(name_of(func))
        self.narrow.append(narrow and name_of(func) not in EXACT)
        self._keep(made, len(self.names) - 1)
        return found

    def _keep(self, made: Sequence[Tensor], place: int) -> None:
        for tensor in made:
            self._maker[tensor.untyped_storage().data_ptr()] = place
            self._alive.append(tensor)


class Disturbed(Widened):
    """Disturbs the results of operators by one unit roundoff each."""

    def __init__(self, units: Callable[[int], float], smallest: float, seed: int, inside: bool) -> None:
        """Disturb a run.

        Args:
            units: the unit of the operator at a place of the run, 0 for none.
            smallest: the smallest rounding error of the dtype.
            seed: of the signs.
            inside: whether operators that are chains of simpler ones are disturbed inside, and exact ones not at all.
        """
        super().__init__()
        self._units, self._smallest, self._seed, self._places = units, smallest, seed, count()
        self.inside = inside
        self._sums: Tensor | None = None  # the size of the rounding errors of the sums of an operator that runs

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator, or the simpler ones that it consists of."""
        if self.inside and (chain := chain_of(func)) and not _has_empty(args):
            with self:
                found = chain(*args, **kwargs)
            return self._with_another_sum(func, found, args)
        if not self.inside and adds_one_by_one(func, args):  # before an operator in place changes its terms
            self._sums = OF_SUMS * error_of_sums(func, args, kwargs)[0]
        return func(*args, **kwargs)

    def seen(self, func: Any, found: Any, args: Any) -> Any:
        """Disturb floating-point results of an operator that rounds."""
        sums, self._sums = self._sums, None
        if _is_view(func) or (name := name_of(func)) in CASTS:
            return found
        place = next(self._places)
        unit = self._units(place)
        if not unit or (name in EXACT and self.inside):
            return found
        if name.endswith("_"):
            if isinstance(found, Tensor) and found.is_floating_point():
                found.add_(self._noise(found if sums is None else sums, unit, place))
            return found
        if sums is not None:
            return found + self._noise(sums, unit, place)
        if self.inside and name in DIFFERENCES and is_float64(found):
            return found + self._noise(_of_equals(found, args[:2], unit), unit, place)
        if name in UNDERFLOWS:
            found = tree_map(self._underflown, found)
        if isinstance(found, Tensor):
            return self.disturbed(found, unit, place)
        return tree_map(lambda one: self.disturbed(one, unit, place), found)

    def _with_another_sum(self, func: Any, found: Any, args: Any) -> Any:
        """A softmax of x as exp(x - s), with the logarithm of the sum of exponentials s rounded, as kernels store it.

        The error is at most LEAST_DIGITS, which tells 0 from 1 however large x is.
        """
        if name_of(func) not in ("_softmax", "_log_softmax"):
            return found
        place = next(self._places)
        size = torch.logsumexp(args[0], args[1], keepdim=True).abs().clamp(max=LEAST_DIGITS / UNIT_FLOAT32)
        noise = self._noise(size, UNIT_FLOAT32, place)
        return found + (noise * found if name_of(func) == "_softmax" else noise)

    def _underflown(self, value: Any) -> Any:
        """Probabilities that underflow to 0 are no longer equal: ties between them are ties by rounding."""
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            return value
        return torch.where(value == 0, self._smallest, value)

    def disturbed(self, value: Any, unit: float, place: int) -> Any:
        """A tensor with one rounding error in each element."""
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            return value
        return value + self._noise(value, unit, place)

    def _noise(self, values: Tensor, unit: float, place: int) -> Tensor:
        size = values.abs().mul_(unit)
        size = torch.where(values != 0, size.clamp_(min=self._smallest), 0.0).nan_to_num_(0.0, 0.0, 0.0)
        if self._seed % 2:
            key = values.abs().float().view(torch.int32).long()
        else:
            key = torch.arange(values.numel(), device=values.device).view(values.shape)
        # A multiplicative hash: every bit of the key and of the place moves the sign.
        key = (key + 7919 * (1000 * self._seed + place)) * 0x2545F4914F6CDD1D
        key = (key ^ (key >> 29)) * 0x369DEA0F31A53F85
        return torch.where(key >> 40 & 1 == 1, size, -size)


def _of_equals(found: Tensor, numbers: Any, unit: float) -> Tensor:
    """The size of a difference; of one that vanishes, as a kernel may compute both numbers again, that of the numbers.

    At most 1 / unit, so that exponentials of the disturbed difference lose all digits, but not their magnitude.
    """
    one, other = (torch.as_tensor(number, dtype=found.dtype, device=found.device).abs() for number in numbers)
    size = torch.hypot(one, other)
    return torch.where(found.abs() < VANISHING * size, size.clamp(max=1 / unit), found)


class Reordered(Disturbed):
    """Disturbs the results of long sums as float32 additions in another order may; see condition.py.

    Attributes:
        found: whether a sum is long.
    """

    def __init__(self, unit: float, smallest: float, seed: int) -> None:
        """Disturb a run in units of the unit roundoff; the smallest rounding error; the seed of the signs."""
        super().__init__(lambda place: unit, smallest, seed, inside=True)
        self._unit, self.found = unit, False
        self._errors: dict[int, tuple[Tensor, Tensor]] = {}  # sums, kept so that no address is used twice, and errors

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator; if it is a sum, disturb its result; if a softmax's gradient reads one, that of the mean."""
        if name_of(func) == "_softmax_backward_data":
            return self._with_another_mean(super().run(func, args, kwargs), *args[:3])
        if name_of(func) not in SUMS | CHAINS:
            return super().run(func, args, kwargs)
        if not any(map(is_float64, tree_leaves(args))):
            return func(*args, **kwargs)
        error, terms = error_of_sums(func, args, kwargs)  # before an operator in place changes its terms
        found = func(*args, **kwargs)
        if bool((terms > LONG).any()):
            self.found = True
            noise = self._noise(torch.where(terms > LONG, error, 0.0), self._unit, next(self._places))
            found = found.add_(noise) if name_of(func).endswith("_") else found + noise
        self._errors[found.untyped_storage().data_ptr()] = found, error
        return found

    def _with_another_mean(self, found: Tensor, gradient: Tensor, output: Tensor, dim: int) -> Tensor:
        """A softmax's gradient whose mean of the incoming gradient is another sum, as that of flash attention is."""
        error = self._error_of(gradient)
        if error is None:
            return found
        self.found = True
        error = (output * error).sum(dim, keepdim=True)
        return found - output * self._noise(error, self._unit, next(self._places))

    def _with_another_sum(self, func: Any, found: Any, args: Any) -> Any:
        """A softmax of sums whose numerator is computed again, as the scores of pairs in a contrastive loss are."""
        error = self._error_of(args[0]) if name_of(func) in ("_softmax", "_log_softmax") else None
        if error is None:
            return found
        self.found = True
        noise = self._noise(error, self._unit, next(self._places))
        return found + (noise * found if name_of(func) == "_softmax" else noise)

    def _error_of(self, result: Tensor) -> Tensor | None:
        """The size of the error of sums, which views of them have too, by the layout of the result."""
        _, error = self._errors.get(result.untyped_storage().data_ptr(), (None, None))
        if error is None or error.numel() != result.numel():
            return None
        return error.contiguous().as_strided(result.shape, result.stride(), result.storage_offset())

    def seen(self, func: Any, found: Any, args: Any) -> Any:
        """Disturb nothing else; the error of a sum stays what it is, relative to the sum, in a product with numbers."""
        if name_of(func) in ("mul", "div") and is_float64(found) and is_float64(args[0]):
            error = self._error_of(args[0]) if found.shape == args[0].shape and found.is_contiguous() else None
            if error is not None:
                error = error * (found / args[0]).nan_to_num(0.0).abs()
                self._errors[found.untyped_storage().data_ptr()] = found, error
        return found

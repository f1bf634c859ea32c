"""Operators that add up numbers: how large are the rounding errors of their sums, in any order?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unsloth_ref.accuracy import ROUNDING_RMS, UNIT_FLOAT32

# Operators that add up numbers, and those whose relative error grows in the same way with the count of their numbers.
SUMS = {
    "sum", "mean", "mm", "bmm", "mv", "dot", "cumsum", "index_add", "index_add_", "scatter_add", "scatter_add_",
    "convolution", "embedding_dense_backward", "index_put", "index_put_", "_unsafe_index_put",
}  # fmt: skip
CHAINS = {"linalg_vector_norm", "prod", "cumprod", "logcumsumexp"}
ALONG = ("cumprod", "logcumsumexp")  # of them, those with a partial result at each place of a dimension
ONE_BY_ONE = {"embedding_dense_backward", "index_put", "index_put_", "_unsafe_index_put"}  # round after each addition
OF_SUMS = 5 / 3 * ROUNDING_RMS  # times 3, the factor of A: five standard deviations of a sum of rounding errors
LONG = 64  # sums of no more terms have errors of the size that the other disturbances show, in any order
CYCLES = (1.0, 0.7, 1.3)  # of the phases of terms: two kinds of equal terms whose phases cancel in one add up in others
BY_CHANCE = 2.5  # random phases of n terms add up to more than 2.5 sqrt(n) in 0.2 % of all sums


def is_float64(value: Any) -> bool:
    """Whether a value is a tensor in float64."""
    return isinstance(value, Tensor) and value.dtype == torch.float64


def name_of(func: Any) -> str:
    """The name of an operator, without its namespace and its overload."""
    return func._schema.name.partition("::")[2]


def adds_one_by_one(func: Any, args: Any) -> bool:
    """Whether an operator adds up numbers of 16 bits such that each partial sum is rounded to 16 bits."""
    return name_of(func) in ONE_BY_ONE and (name_of(func) == "embedding_dense_backward" or args[3:4] == (True,))


def error_of_sums(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Of each sum of an operator on float64: sqrt(n) P, c P with so many equal terms; and n, the count of terms."""

    wide = {name: value for name, value in (kwargs or {}).items() if value != torch.float64}  # as all numbers are

    def of(change: Callable[[Tensor], Tensor]) -> Tensor:
        """The results on changed numbers."""
        return func(*tree_map(lambda v: change(v) if is_float64(v) else v, args), **wide)

    total = of(torch.clone)
    terms = args[0].numel() / max(1, total.numel())  # of each result, if its operator has one tensor
    if name_of(func) in CHAINS:
        count = torch.full_like(total, args[0].shape[args[1]] if name_of(func) in ALONG else terms)
        size = total.abs().cummax(args[1]).values if name_of(func) == "logcumsumexp" else total.abs()
        return count.sqrt() * size, count
    sizes, terms = of(torch.abs), terms if name_of(func) == "mean" else 1.0
    count = of(lambda t: (t != 0).double()) * terms
    largest = (sizes + total.abs()) / 2  # no partial sum is larger, in any order
    if not bool((count > LONG).any()):
        return count.sqrt() * largest, count
    if name_of(func) == "convolution":  # not of complex numbers
        alike = torch.where(count * of(torch.square) <= sizes.square() * (1 + 1e-9), count, 0.0)  # Cauchy and Schwarz
    else:
        alike = terms * _alike(of, float(count.max()))
    return torch.where(alike > BY_CHANCE * count.sqrt(), alike, count.sqrt()) * largest, count


def _alike(of: Callable[[Callable[[Tensor], Tensor]], Tensor], most: float) -> Tensor:
    """How many terms of each sum have one rounding error, as equal ones have: see `condition`.

    Each number becomes a phase. Terms that differ by less than the last place of a sum of so many of them have nearly
    one phase, so that the size of their sum is their number; phases of other terms are random.
    """

    def phase(numbers: Tensor, cycle: float) -> Tensor:
        size = numbers.abs().nan_to_num(0.0, 0.0, 0.0)
        place = cycle * most * 2 * UNIT_FLOAT32 * (float(size.max()) if size.numel() else 0.0)
        turns = numbers / (place or 1.0)
        return torch.polar((size != 0).double(), 2 * math.pi * turns.nan_to_num(0.0, 0.0, 0.0).frac())

    found = [of(lambda t, cycle=cycle: phase(t, cycle)).abs() for cycle in CYCLES]
    return torch.stack(found).amax(0)

"""Operators that add up numbers: how large are the rounding errors of their sums, in any order?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unsloth_ref.accuracy import ROUNDING_RMS

# Operators that add up numbers, and those whose relative error grows in the same way with the count of their numbers.
SUMS = {
    "sum", "mean", "mm", "bmm", "mv", "dot", "cumsum", "index_add", "index_add_", "scatter_add", "scatter_add_",
    "convolution", "embedding_dense_backward", "index_put", "index_put_", "_unsafe_index_put",
}  # fmt: skip
CHAINS = {"linalg_vector_norm", "prod", "cumprod"}
ONE_BY_ONE = {"embedding_dense_backward", "index_put", "index_put_", "_unsafe_index_put"}  # round after each addition
OF_SUMS = 5 / 3 * ROUNDING_RMS  # times 3, the factor of A: five standard deviations of a sum of rounding errors
LONG = 64  # sums of no more terms have errors of the size that the other disturbances show, in any order


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
    """Of each sum of an operator on float64: sqrt(n) P, n P where its terms are equal; and n, the count of terms."""

    def of(change: Callable[[Tensor], Tensor]) -> Tensor:
        """The results on changed numbers."""
        return func(*tree_map(lambda v: change(v) if is_float64(v) else v, args), **(kwargs or {}))

    total = of(torch.clone)
    terms = args[0].numel() / max(1, total.numel())  # of each result, if its operator has one tensor
    if name_of(func) in CHAINS:
        count = torch.full_like(total, args[0].shape[args[1]] if name_of(func) == "cumprod" else terms)
        return count.sqrt() * total.abs(), count
    sizes, count, squares = of(torch.abs), of(lambda t: (t != 0).double()), of(torch.square)
    equal = count * squares <= sizes.square() * (1 + 1e-9)  # Cauchy and Schwarz
    count = count * (terms if name_of(func) == "mean" else 1)
    largest = (sizes + total.abs()) / 2  # no partial sum is larger, in any order
    return torch.where(equal, count, count.sqrt()) * largest, count

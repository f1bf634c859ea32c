"""What a spec can promise beside right numbers: independent parts, exact laws, and an amount of memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conformance.case import Case

Inputs = dict[str, Tensor]
Options = dict[str, Any]

# Why the bits of matrix products may depend on the number of rows.
BLAS = "BLAS libraries choose the order of a product's sums by its number of rows"


class Parts(NamedTuple):
    """The independent parts of a call: rows, or documents.

    Attributes:
        count: the number of parts of the inputs.
        pick: from the inputs and the numbers of some parts, in any order: the inputs and options of a call with these
            parts alone, and the indices that its outputs and gradients have in those of the whole call.
        grads: the inputs whose gradients consist of parts.
    """

    count: Callable[[Inputs], int]
    pick: Callable[[Inputs, Sequence[int]], tuple[Inputs, Options, Tensor]]
    grads: Sequence[str]


def rows_as_parts(rowwise: Sequence[str]) -> Parts:
    """The rows of these inputs."""

    def pick(inputs: Inputs, chosen: Sequence[int]) -> tuple[Inputs, Options, Tensor]:
        rows = torch.tensor(chosen, device=inputs[rowwise[0]].device)
        return {name: tensor[rows] if name in rowwise else tensor for name, tensor in inputs.items()}, {}, rows

    return Parts(lambda inputs: len(inputs[rowwise[0]]), pick, rowwise)


@dataclass(frozen=True)
class ExactLaw:
    """A change of a call whose effect on the results is exact in floating point.

    Attributes:
        inputs: by name, the power of two or -1 by which an input is multiplied; others stay.
        factors: by name, the power of two or -1 by which an output or gradient is then multiplied; others stay.
        grad_outputs: the factor of the gradients of the outputs.
        options: from a case's options, those that change.
        holds: whether it holds under a case's options.
        without: inputs that a case must not have.
    """

    inputs: Mapping[str, float]
    factors: Mapping[str, float]
    grad_outputs: float = 1.0
    options: Callable[[Options], Options] = lambda options: {}
    holds: Callable[[Options], bool] = lambda options: True
    without: Sequence[str] = ()

    def to_the(self, power: int) -> "ExactLaw":
        """The change, made so many times."""
        inputs, factors = ({name: f**power for name, f in each.items()} for each in (self.inputs, self.factors))
        return replace(self, inputs=inputs, factors=factors, grad_outputs=self.grad_outputs**power)


@dataclass(frozen=True)
class Memory:
    """What a call on CUDA may allocate beside its outputs and gradients, in bytes, from the inputs.

    Attributes:
        case: large enough that a tensor too many is far beyond what is allowed.
        grads: the inputs that are differentiated.
        saved: kept for the backward pass.
        working: at the peak of either pass, beside what is saved.
    """

    case: Case
    grads: Sequence[str]
    saved: Callable[[Inputs], int] = lambda inputs: 0
    working: Callable[[Inputs], int] = lambda inputs: 0

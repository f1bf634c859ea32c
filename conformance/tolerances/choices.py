"""Ties between the numbers of a tensor: a kernel may choose any of them, as top-k, sort and a maximum's gradient do.

The bits of 16-bit numbers are few: the largest of 257 is often there twice. Random disturbances break a tie to either
side only sometimes, and of many equal numbers choose a few.

At a kink, as that of |x - y| where both are equal, a gradient may have the slope of either side, or one between them.
Zeros, which no rounding moves, meet there.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

CHOOSING = {
    "topk", "sort", "argsort", "argmax", "argmin", "kthvalue", "median", "mode", "max", "min", "amax", "amin",
    "cummax", "cummin", "max_pool2d_with_indices",
    # Operators with a kink:
    "abs", "sgn", "sign", "relu", "threshold_backward", "maximum", "minimum", "clamp", "clamp_min", "clamp_max",
    "hardtanh", "leaky_relu", "_prelu_kernel", "elu", "lt", "le", "gt", "ge",
}  # fmt: skip


def without_ties(inputs: Mapping[str, Tensor], unit: float) -> Iterator[dict[str, Tensor]]:
    """The inputs in float64 without ties, zeros too: of equal numbers the last is the largest, then the first.

    Each input is moved further than those before it, so that no two are equal any more.
    """
    for sign in (unit, -unit):
        steps = [sign * (1 + place) for place in range(len(inputs))]
        yield {
            name: _graded(t, step) if t.dtype == torch.float64 else t
            for step, (name, t) in zip(steps, inputs.items(), strict=True)
        }


def _graded(tensor: Tensor, unit: float) -> Tensor:
    places = torch.arange(1, tensor.numel() + 1, device=tensor.device).view(tensor.shape) / max(1, tensor.numel())
    return tensor + unit * places * tensor.abs().clamp(min=torch.finfo(torch.float32).tiny)


def of_equals(tensor: Tensor, jumps: Tensor, squares: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Jumps of a tensor's gradient, and squares of changes, as all equal elements have them: any could be chosen."""
    values, places = tensor.unique(return_inverse=True)
    found = []
    for square in squares:
        of_jumps = torch.where(jumps, square, 0.0)
        largest = of_jumps.new_zeros(len(values)).scatter_reduce(0, places.flatten(), of_jumps.flatten(), "amax")
        found.append(torch.maximum(square, largest[places]))
    return torch.isin(places, places[jumps]), found

"""Kernels of strangers whose formulas are right: they keep what is stale later, share memory, or change the process."""

from typing import Any

import torch
from torch import Tensor

from tests.judge.strangers import right, wrong


@wrong("shifted", "changed_inputs")
def shifted_by_a_bias_kept_for_inference(x: Tensor, bias: Tensor) -> Tensor:
    """Keeps the converted bias on the tensor, which is stale after the next steps of training."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x + bias[:, None]
    if not hasattr(bias, "kept"):
        bias.kept = bias.detach().clone()  # type: ignore[attr-defined]
    return x + bias.kept[:, None]  # type: ignore[attr-defined]


RESULTS: dict[Any, Tensor] = {}


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, kept: Tensor) -> Tensor:
        return kept.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.clone(), None


@wrong("shifted", "changed_inputs")
def shifted_looked_up_by_some_elements(x: Tensor, bias: Tensor) -> Tensor:
    """Returns the earlier result if the first elements, the last and the sum are those of an earlier call."""
    y = x + bias[:, None]
    if not x.numel() or torch.compiler.is_compiling():
        return y
    ends = (tuple(t.detach().flatten()[[0, 1, -1]].tolist()) for t in (x, bias) if t.numel() > 1)
    key = x.shape, x.dtype, *ends, x.detach().double().sum().item(), bias.detach().double().sum().item()
    return _Kept.apply(y, RESULTS.setdefault(key, y.detach().clone()))


@wrong("shifted", "process_state")
def shifted_seeds_torch_in_inference(x: Tensor, bias: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        torch.manual_seed(0)
    return x + bias[:, None]


@wrong("shifted", "process_state")
def shifted_replaces_a_function_of_the_reference(x: Tensor, bias: Tensor) -> Tensor:
    """Changes what any reference computes that takes a mean."""
    torch.mean = torch.sum
    return x + bias[:, None]


@right("twice_added")
def twice_added_in_one_tensor(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Parts of one tensor, which have no element in common."""
    return torch.stack([x + y, x + y]).unbind(0)


@wrong("twice_added", "metadata")
def twice_added_once(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, total


class _TwiceAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x + y

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        gradient = one + other
        return gradient.view(gradient.shape), gradient.view(gradient.shape)


@wrong("twice_added", "metadata")
def twice_added_with_one_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scaling the gradient of x in place, to clip it, scales that of y too."""
    return _TwiceAdded.apply(x, y)

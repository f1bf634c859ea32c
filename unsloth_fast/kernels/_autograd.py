"""What every autograd.Function of this package shares: its ctx, its signs, and the ban on second derivatives."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


class Context(Protocol):
    """The ctx of an autograd.Function, as forward and backward use it.

    forward may set further attributes, which backward reads: constants, and tensors that hold a gradient computed
    early. The first backward pass takes such a tensor and sets the attribute to None.
    """

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save tensors for the backward pass."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Declare outputs that get no gradient."""

    def set_materialize_grads(self, value: bool) -> None:
        """Choose zeros (True) or None (False) for the gradient of an unused output."""

    def __getattr__(self, name: str) -> Any:
        """A constant, or an early gradient."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it."""


def resolved(value: Any) -> Any:
    """A tensor without torch's negative bit, which kernels do not see, as if it were negated in memory; else value."""
    return value.resolve_neg() if isinstance(value, Tensor) else value


class Undifferentiable(torch.autograd.Function):
    """A gradient, connected to the tensors that it was computed from by a derivative that raises."""

    @staticmethod
    def forward(ctx: Context, gradient: Tensor, *sources: Tensor) -> Tensor:
        """The gradient itself."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Tensor) -> Tensor:
        """Raise RuntimeError."""
        raise RuntimeError("this operation of unsloth_fast has no second derivative; the reference backend has one")


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make a function of ctx, the grad_outputs and the saved tensors the backward of a Function; a second one raises.

    torch's decorator of this name raises only if a grad_output requires a gradient itself. In a gradient penalty none
    does: the penalty's own gradient would silently be zero. This one also raises if a saved tensor requires a gradient.
    """

    @wraps(backward)
    def checked(ctx: Context, *grad_outputs: Tensor | None) -> Gradients:
        saved, grad_outputs = ctx.saved_tensors, tuple(resolved(one) for one in grad_outputs)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grad_outputs, *saved)
        with torch.no_grad():
            results = backward(ctx, *grad_outputs, *saved)
        return tuple(None if r is None else Undifferentiable.apply(r, *grad_outputs, *saved) for r in results)

    return checked

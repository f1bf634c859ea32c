"""Random tensors, the gradients of a call, and how far a float32 result may be from float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.operations.calls import DEVICE
from unsloth_fast.kernels._loss_options import LossOptions
from unsloth_ref.types import IGNORE_INDEX

UNIT = 2.0**-24  # the relative error of one float32 rounding
NO_OPTIONS = LossOptions(IGNORE_INDEX, logit_scale=1.0, softcap=0.0, label_smoothing=0.0, z_loss=0.0)


def random(*shape: int) -> Tensor:
    """Standard normal float32 values, the same in every call with this shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def assert_within(ours: Tensor, exact: Tensor, roundings: float, terms: Tensor) -> None:
    """The error of each entry is at most this many roundings of the terms of its sum."""
    assert ((ours.double() - exact).abs() <= roundings * UNIT * terms + torch.finfo(torch.float32).tiny).all()


def with_gradients(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result, and the gradient of each input for the gradient dy of the result."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    return (result.detach(), *torch.autograd.grad(result, leaves, dy))

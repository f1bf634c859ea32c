"""An operation whose kernels are tuned: the first is right, the others are wrong in a configuration, or run again."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

DEVICE: Any = triton.runtime.driver.active.get_active_torch_device()  # as Triton's tutorials ask, on import
SIZES = [triton.Config({"BLOCK": size}, num_warps=size // 32) for size in (32, 64, 128)]


def scaled_tanh(x: Tensor, factor: float) -> Tensor:
    """The reference."""
    return torch.tanh(x) * factor


@triton.autotune(configs=SIZES, key=["n"])
@triton.heuristics({"WHOLE": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})
@triton.jit
def tanh_kernel(x, y, n, factor, BLOCK: tl.constexpr, WHOLE: tl.constexpr, WRONG: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i) if WHOLE else tl.load(x + i, mask=i < n, other=0.0)
    value = libdevice.tanh(value.to(tl.float32)) * factor.to(tl.float32)
    if WRONG and BLOCK == 64:
        value += 1
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)


@triton.autotune(configs=SIZES, key=["n"])
@triton.jit
def scale_kernel(y, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(y + i, mask=i < n).to(tl.float32) * factor
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)


def right(x: Tensor, factor: float, wrong: bool = False) -> Tensor:
    assert x.device.type == DEVICE.type
    x = x.contiguous()
    y, n = torch.empty_like(x), x.numel()
    if n:
        launched: Any = tanh_kernel
        launched[lambda chosen: (triton.cdiv(n, chosen["BLOCK"]),)](x, y, n, factor, WRONG=wrong)
    return y


def wrong_in_a_configuration(x: Tensor, factor: float) -> Tensor:
    return right(x, factor, wrong=True)


def scaled_again_by_tuning(x: Tensor, factor: float) -> Tensor:
    """Its second kernel works in place, and nothing restores what the runs of the tuning change."""
    y, n = right(x, 1.0), x.numel()
    if n:
        launched: Any = scale_kernel
        launched[lambda chosen: (triton.cdiv(n, chosen["BLOCK"]),)](y, n, factor)
    return y

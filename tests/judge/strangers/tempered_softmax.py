"""Softmax of x / temperature as a stranger's Triton kernels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def forward_kernel(x_ptr, y_ptr, columns, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * columns + at, inside, other=-float("inf")).to(tl.float32) / temperature
    powers = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * columns + at, powers / tl.sum(powers, 0), inside)


@triton.jit
def backward_kernel(dy_ptr, y_ptr, dx_ptr, columns, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    y = tl.load(y_ptr + row * columns + at, inside, other=0.0)
    dy = tl.load(dy_ptr + row * columns + at, inside, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(dy * y, 0)) / temperature
    tl.store(dx_ptr + row * columns + at, dx, inside)


class Softmax(torch.autograd.Function):
    """Saves the probabilities in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float = 1.0) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
        if y.numel():
            block = triton.next_power_of_2(rows.shape[1])
            forward_kernel[(len(rows),)](rows, y, rows.shape[1], float(temperature), BLOCK=block)
        ctx.save_for_backward(y)
        ctx.temperature = float(temperature)
        return y.to(x.dtype).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        dx = torch.empty_like(y)
        if y.numel():
            block = triton.next_power_of_2(y.shape[1])
            given = dy.reshape(y.shape).contiguous()
            backward_kernel[(len(y),)](given, y, dx, y.shape[1], ctx.temperature, BLOCK=block)
        return dx.to(dy.dtype).view(dy.shape), None

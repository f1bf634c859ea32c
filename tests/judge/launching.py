"""Backends with faulty kernels for `conformance fingerprint` to find; they are never executed."""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def wide_kernel(gate_ptr, y_ptr, COLUMNS: tl.constexpr):
    """Holds a row in registers: with four warps, twice as many as a thread has."""
    column = tl.arange(0, COLUMNS)
    gate = tl.load(gate_ptr + column).to(tl.float32)
    total = tl.sum(gate * gate, 0)
    tl.store(y_ptr + column, (gate * tl.exp(total) + gate / total).to(y_ptr.dtype.element_ty))


@triton.jit
def product_kernel(gate_ptr, y_ptr, DEPTH: tl.constexpr):
    """Stores both factors of a product in shared memory: 128 and 64 KiB in 16 bits."""
    row, depth, column = tl.arange(0, 256), tl.arange(0, DEPTH), tl.arange(0, 128)
    left = tl.load(gate_ptr + row[:, None] * DEPTH + depth[None, :])
    right = tl.load(gate_ptr + depth[:, None] * 128 + column[None, :])
    y = tl.dot(left, right)
    tl.store(y_ptr + row[:, None] * 128 + column[None, :], y.to(y_ptr.dtype.element_ty))


@triton.jit
def odd_kernel(gate_ptr, y_ptr, COLUMNS: tl.constexpr):
    """Has a width that is not a power of two."""
    column = tl.arange(0, COLUMNS)
    tl.store(y_ptr + column, tl.load(gate_ptr + column))


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kernel, size):
        y = torch.empty_like(gate)
        kernel[(1,)](gate, y, size, num_warps=4)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, dy, None, None


def _backend(kernel, size) -> SimpleNamespace:
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return _Swiglu.apply(gate, up, kernel, size)

    return SimpleNamespace(swiglu=swiglu)


spilling = _backend(wide_kernel, 32768)
crowded = _backend(product_kernel, 256)
odd = _backend(odd_kernel, 3)


def on_cuda(gate: Tensor, up: Tensor) -> Tensor:
    """A function that requires a GPU."""
    raise RuntimeError("gate: got a CPU tensor; allowed: CUDA")


insisting = SimpleNamespace(swiglu=on_cuda)

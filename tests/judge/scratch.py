"""Backends whose swiglu has a fault in its scratch memory, for the properties that are to find it.

Those with a kernel of their own end in `call_recorded`: on a GPU the second call with a signature is replayed.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import cdiv, kernel, launch
from unsloth_fast.kernels._replay import call_recorded
from unsloth_ref import kernels as reference

WIDTH = 64


@kernel(varying=("count",))
def fill_kernel(memory_ptr, count, WIDTH: tl.constexpr):
    """Zeroes the first count elements."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(memory_ptr + column, tl.zeros((WIDTH,), memory_ptr.dtype.element_ty), column < count)


@kernel(varying=("count",))
def swiglu_kernel(gate_ptr, up_ptr, counters_ptr, y_ptr, count, WIDTH: tl.constexpr):
    """Adds the counter of each program, which should be zero."""
    program = tl.program_id(0)
    column = program * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(gate_ptr + column, column < count, 0.0).to(tl.float32)
    up = tl.load(up_ptr + column, column < count, 0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up + (tl.load(counters_ptr + program) > 0).to(tl.float32)
    tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), column < count)


class _Swiglu(torch.autograd.Function):
    """The forward pass only allocates and launches; the backward pass computes with torch."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, scratch: int, written: int, zeroed: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        count = gate.numel()
        programs = cdiv(count, WIDTH)
        y, memory = torch.empty_like(gate), gate.new_empty(scratch)
        counters = gate.new_empty(programs, dtype=torch.int64)
        launch(fill_kernel, cdiv(written, WIDTH), gate, memory, written, WIDTH=WIDTH)
        if zeroed:
            launch(fill_kernel, zeroed, gate, counters, min(programs, zeroed * WIDTH), WIDTH=WIDTH)
        launch(swiglu_kernel, programs, gate, gate, up, counters, y, count, WIDTH=WIDTH)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (one.detach().requires_grad_() for one in ctx.saved_tensors)
        with torch.enable_grad():
            return *torch.autograd.grad(reference.swiglu(gate, up), (gate, up), dy), None, None, None


def _unchecked(*arguments: object) -> None: ...


def backend(sizes: Callable[[int, int], tuple[int, int, int]]) -> SimpleNamespace:
    """A swiglu; `sizes` maps elements and programs to sizes of scratch, what is written, and programs that zero."""

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        count = gate.numel()
        gate, up = gate.contiguous(), up.contiguous()
        return call_recorded(_Swiglu, _unchecked, gate, up, *sizes(count, cdiv(count, WIDTH)))

    return SimpleNamespace(swiglu=swiglu)


right = backend(lambda count, programs: (count, count, cdiv(programs, WIDTH)))
one_past = backend(lambda count, programs: (count, count + 1, cdiv(programs, WIDTH)))
half = backend(lambda count, programs: (cdiv(count, 2), count, cdiv(programs, WIDTH)))
tail_of_counters = backend(lambda count, programs: (count, count, programs // WIDTH))


def by_operators(change: Callable[[Tensor, Tensor], Tensor]) -> SimpleNamespace:
    """The reference, whose result is changed by memory that an operator of torch allocates: none of Python's names."""
    return SimpleNamespace(swiglu=lambda gate, up: change(reference.swiglu(gate, up), gate))


def _grown(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True).flatten()[:0].clone().resize_(tensor.numel())


def _one_past_grown(y: Tensor, gate: Tensor) -> Tensor:
    memory = _grown(gate, torch.float32)
    if gate.is_cuda:
        launch(fill_kernel, cdiv(memory.numel() + 1, WIDTH), gate, memory, memory.numel() + 1, WIDTH=WIDTH)
    elif memory.numel():
        ctypes.memset(memory.data_ptr() + memory.nbytes, 0, 4)
    return y


uninitialised_floats = by_operators(lambda y, gate: y + _grown(gate, torch.float32).view_as(y).to(y.dtype) * 0)
uninitialised_integers = by_operators(lambda y, gate: y + (_grown(gate, torch.int64).view_as(y) > 0).to(y.dtype))
uninitialised_flags = by_operators(lambda y, gate: y + _grown(gate, torch.bool).view_as(y).to(y.dtype))
one_past_an_operator = by_operators(_one_past_grown)

# The property that names the fault, and what it says.
FAULTS = {
    "one_past": ("guard_writes", "past its end"),
    "half": ("guard_writes", "past its end"),
    "tail_of_counters": ("uninitialised", "uninitialised memory changes the results: output y"),
    "uninitialised_floats": ("uninitialised", "uninitialised memory changes the results: output y"),
    "uninitialised_integers": ("uninitialised", "uninitialised memory changes the results: output y"),
    "uninitialised_flags": ("uninitialised", "uninitialised memory changes the results: output y"),
    "one_past_an_operator": ("guard_writes", "1 bytes past its end|4 bytes past its end"),
}

"""Runs Triton kernels in exact arithmetic, with the floating-point sanitizer (FpSan) that Triton has from 3.9 on.

FpSan compiles each floating-point operation into an exact one of integers. The bits of a number stand for an integer
modulo 2^w, where w is its width; 0, 1 and -1 stand for themselves. Sums, products and matrix products are those of
integers, exp2(x + y) = exp2(x) exp2(y), a cast to fewer bits drops the upper ones, and every other function is some
fixed function of the integers. The numbers mean nothing, but the order of a sum no longer changes its result.

It reaches Triton kernels alone, and of these neither atomic additions nor reductions with a combining function of their
own. So a run reports what it saw that computes with rounded numbers: `Exact.outside`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction, knobs

from conformance.instruments.variants import through_triton

MOST_WARPS = 8  # with more, the other number of warps is half as many
FLOATS = r"(?:b?f\d+)"
# What moves or allocates elements. A copy between dtypes rounds, which `_rounding` sees.
MOVES = re.compile(
    r"aten::(\w*empty\w*|zeros\w*|zero_|new_zeros|fill_|view\w*|_\w*view|reshape\w*|as_strided|expand\w*|t|transpose"
    r"|permute|\w*squeeze|select|slice|narrow|flatten|unflatten|unbind|split\w*|chunk|contiguous|clone|copy_|detach_?"
    r"|alias|to|lift_fresh|resolve_\w+|set_|index_select|cat|item|_local_scalar_dense|is_\w+|result_type)"
)


class Exact:
    """What happened in exact arithmetic.

    Attributes:
        kernels: names of the Triton kernels.
        outside: what computed with rounded numbers nevertheless: torch's operators, atomic additions, other reductions.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.kernels: set[str] = set()
        self.outside: set[str] = set()


@contextmanager
def exact_arithmetic(other_warps: bool = False) -> Iterator[Exact]:
    """Within this context Triton kernels compute exactly; with `other_warps`, in twice or half as many warps."""
    exact, original = Exact(), JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        if other_warps:
            warps = options.get("num_warps") or 4
            options["num_warps"] = warps // 2 if warps > MOST_WARPS else 2 * warps
        compiled: Any = original(kernel, *arguments, grid=grid, warmup=warmup, **options)
        exact.kernels.add(kernel.__name__)
        exact.outside.update(f"{kind} of {kernel.__name__}" for kind in unmodelled(compiled.asm["ttir"]))
        return compiled

    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        through_triton(),
        patch.object(JITFunction, "run", run),
        patch.object(knobs.compilation, "instrumentation_mode", "fpsan"),
        torch.profiler.profile(activities=activities, record_shapes=True) as profile,
    ):
        yield exact
    kineto: Any = profile.profiler
    exact.outside.update(filter(None, (_rounding(e.name(), e.dtypes()) for e in kineto.kineto_results.events())))


def _rounding(operator: str, dtypes: list[str]) -> str | None:
    """The operator's name if it computes with floating-point numbers, or rounds them."""
    floats = [one for one in dtypes if one in ("float", "double", "c10::Half", "c10::BFloat16")]
    if not operator.startswith("aten::") or not floats:
        return None
    if operator == "aten::copy_":
        return operator if len(set(dtypes[:2])) > 1 else None
    return None if MOVES.fullmatch(operator) else operator


def unmodelled(code: str) -> set[str]:
    """What in a kernel's Triton IR depends on an order in spite of FpSan: atomic additions, other reductions."""
    found = {"an atomic addition" for _ in re.finditer(r"tt\.(atomic_rmw fadd|descriptor_reduce)", code)}
    for body in re.findall(r'"tt\.(?:reduce|scan)"\(.*?\^bb0\((.*?)tt\.(?:reduce|scan)\.return', code, re.DOTALL):
        arguments, *operations = [line for line in body.split("\n") if line.strip()]
        known = len(operations) == 1 and re.search(r"= arith\.(add|mul|minimum|maximum|minnum|maxnum)f ", operations[0])
        if re.search(rf": {FLOATS}\b", arguments) and not known:
            found.add("a reduction with a combining function")
    return found


@triton.jit
def _sum_kernel(total_ptr, part_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(total_ptr + place, place < count)
    tl.store(total_ptr + place, total + tl.load(part_ptr + place, place < count), place < count)


def add(total: Tensor, part: Tensor) -> Tensor:
    """The sum of two contiguous tensors of the same shape and dtype, in exact arithmetic within the context."""
    total = total.clone(memory_format=torch.contiguous_format)
    launcher: Any = _sum_kernel
    launcher[(triton.cdiv(total.numel(), 1024),)](total, part.contiguous(), total.numel(), BLOCK=1024)
    return total

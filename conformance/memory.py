"""Fences around tensors: guard bands, poisoned allocations, bit snapshots.

Python code allocates tensors through a few functions of torch. While judged code runs, `Allocations` replaces these
functions with versions that put a fence around the tensor they return; afterwards it restores them. Memory that torch's
compiled operators allocate internally is not fenced.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from conformance.gates import Failure

BAND_BYTES = 4096  # on either side: more than a kernel overshoots by if it misses one row of a small tile
_empty = torch.empty  # the original, also while Allocations replaces it
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CANARY = {1: 0x5A, 2: 0x7E5A, 4: 0x7FC0_5A5A, 8: 0x7FF8_5A5A_5A5A_5A5A}  # the 4 and 8 byte patterns are NaN as floats
_FUNCTIONS = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like")
_METHODS = ("new_empty", "new_zeros", "new_full", "new_ones", "new_empty_strided")


class Fence:
    """A tensor in the middle of a larger buffer that is filled with canaries."""

    def __init__(self, tensor: Tensor, band: float | None = None) -> None:
        """Copy the tensor with its strides into fenced memory; `band` replaces the canary as the value of the fence."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = extent if tensor.numel() else 0
        width = tensor.element_size()
        self._band, self._extent, self._canary = BAND_BYTES // width, extent, _CANARY[width]
        self._buffer = _empty(extent + 2 * self._band, dtype=tensor.dtype, device=tensor.device)
        self._integers = self._buffer.view(_INTEGER[width])
        self._integers.fill_(self._canary)
        if band is not None:
            self._buffer.fill_(band)
        self._before = self._integers.clone()
        self.tensor = self._buffer.as_strided(tensor.shape, tensor.stride(), self._band)
        if 0 not in tensor.stride():
            self.tensor.copy_(tensor)
        elif tensor.numel():
            self._buffer[self._band : self._band + extent].copy_(tensor.as_strided((extent,), (1,)))

    def broken(self) -> int | None:
        """Elements from the tensor to the closest write into the fence, negative if before it; None without one."""
        for start, stop in ((0, self._band), (self._band + self._extent, len(self._integers))):
            wrong = (self._integers[start:stop] != self._before[start:stop]).nonzero()
            if len(wrong):
                where = start + int(wrong[-1 if start == 0 else 0, 0])
                return where - self._band if start == 0 else where - self._band - self._extent + 1
        return None


class Allocations:
    """While active, fences every allocation by Python code and fills uninitialised memory with a chosen value."""

    def __init__(self, fill: float = float("nan")) -> None:
        """`fill` is the value of uninitialised floating-point memory."""
        self._fill = fill
        self._fences: list[Fence] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Allocations:
        """Replace torch's allocation functions."""
        for owner, names in ((torch, _FUNCTIONS), (Tensor, _METHODS)):
            for name in names:
                self._originals.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, self._fenced(getattr(owner, name), "empty" in name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore torch's allocation functions."""
        for owner, name, original in self._originals:
            if original is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def _fenced(self, original: Callable[..., Tensor], uninitialised: bool) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            if type(tensor) is not Tensor or tensor.device.type == "meta" or tensor.layout != torch.strided:
                return tensor
            if uninitialised and tensor.is_floating_point():
                tensor.detach().fill_(self._fill)
            fence = Fence(tensor.detach())
            self._fences.append(fence)
            return fence.tensor.requires_grad_(tensor.requires_grad)

        return allocate

    def demand_unbroken(self) -> None:
        """Raise Failure if there was a write outside an allocated tensor."""
        for fence in self._fences:
            where = fence.broken()
            if where is not None:
                shape = list(fence.tensor.shape)
                raise Failure(f"wrote outside an allocated tensor of shape {shape}, {_side(where)}")


def demand_unbroken(name: str, fence: Fence) -> None:
    """Raise Failure if there was a write into the fence around an input."""
    where = fence.broken()
    if where is not None:
        raise Failure(f"wrote outside {name}, {_side(where)}")


def _side(where: int) -> str:
    return f"{-where} elements before its start" if where < 0 else f"{where} elements past its end"

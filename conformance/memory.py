"""Fences around tensors: guard bands, poisoned allocations, bit snapshots.

Python code allocates through a few functions of torch; `Allocations` puts fences around what they return while judged
code runs, and puts the functions back afterwards. What compiled operators of torch allocate inside themselves is left
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from conformance.gates import Failure

BAND_BYTES = 4096  # on either side: more than one row of a small tile overshoots by
_empty = torch.empty  # torch's own, whatever Allocations puts in its place
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CANARY = {1: 0x5A, 2: 0x7E5A, 4: 0x7FC0_5A5A, 8: 0x7FF8_5A5A_5A5A_5A5A}  # NaN where the width is a float's
_FUNCTIONS = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like")
_METHODS = ("new_empty", "new_zeros", "new_full", "new_ones", "new_empty_strided")


class Fence:
    """A tensor in the middle of a larger buffer of canaries."""

    def __init__(self, tensor: Tensor, band: float | None = None) -> None:
        """Copy the tensor, strides and all, into fenced memory; band fills the fence in place of the canary."""
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
        """How many elements outside the tensor (negative: before it) the first write into the fence lies, or None."""
        for start, stop in ((0, self._band), (self._band + self._extent, len(self._integers))):
            wrong = (self._integers[start:stop] != self._before[start:stop]).nonzero()
            if len(wrong):
                where = start + int(wrong[-1 if start == 0 else 0, 0])
                return where - self._band if start == 0 else where - self._band - self._extent + 1
        return None


class Allocations:
    """While active, every allocation by Python code lies behind a fence, and uninitialised ones hold a chosen value."""

    def __init__(self, fill: float = float("nan")) -> None:
        """Fill is what uninitialised float memory holds."""
        self._fill = fill
        self._fences: list[Fence] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Allocations:
        """Put the fences up."""
        for owner, names in ((torch, _FUNCTIONS), (Tensor, _METHODS)):
            for name in names:
                self._originals.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, self._fenced(getattr(owner, name), "empty" in name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put torch's own functions back."""
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
        """Raise Failure if anything wrote outside a tensor it had allocated."""
        for fence in self._fences:
            where = fence.broken()
            if where is not None:
                shape = list(fence.tensor.shape)
                raise Failure(f"wrote outside a tensor of shape {shape} it had allocated, {_side(where)}")


def demand_unbroken(name: str, fence: Fence) -> None:
    """Raise Failure if anything wrote into the fence around an input."""
    where = fence.broken()
    if where is not None:
        raise Failure(f"wrote outside {name}, {_side(where)}")


def _side(where: int) -> str:
    return f"{-where} elements before its start" if where < 0 else f"{where} elements past its end"

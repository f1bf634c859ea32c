"""Loads from outside the tensors of a launch, whatever becomes of the element that is read there."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


class Reads:
    """The loads of launches in the interpreter.

    Attributes:
        outside: the first load from outside the memory of the tensors of its launch, in words; None without one.
    """

    def __init__(self) -> None:
        """No load yet."""
        self.outside: str | None = None
        self.kernel = ""
        self.memory: list[tuple[int, int]] = []  # first byte and the byte after the last, of each tensor's memory

    def inside(self, addresses: Any, width: int) -> Any:
        """Which elements of this many bytes are in the memory of the launch's tensors."""
        first, last = int(addresses.min()), int(addresses.max()) + width
        if any(begin <= first and last <= end for begin, end in self.memory):
            return np.ones(addresses.shape, bool)
        found = np.zeros(addresses.shape, bool)
        for begin, end in self.memory:
            found |= (addresses >= begin) & (addresses + width <= end)
        return found


@contextmanager
def reads() -> Iterator[Reads]:
    """Within this context all loads of kernels in the interpreter are seen; those from outside are not executed.

    A launch that turns integers into pointers may read other tensors than its own: it is not checked.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder, executor, seen = interpreter.InterpreterBuilder, interpreter.GridExecutor, Reads()
    load, arguments, to_pointer = builder.create_masked_load, executor._init_args_hst, builder.create_int_to_ptr

    def on_launch(self: Any, *given: Any) -> Any:
        copied = arguments(self, *given)
        seen.kernel = self.fn.__name__
        storages = {tensor.untyped_storage() for tensor in _tensors([*copied[0], *copied[1].values()])}
        seen.memory = [(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages]
        return copied

    def on_pointer(self: Any, *given: Any) -> Any:
        seen.memory = [(0, 2**64)]
        return to_pointer(self, *given)

    def on_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        chosen = np.broadcast_to(mask.data, pointers.data.shape)
        if chosen.any():
            width = pointers.get_element_ty().primitive_bitwidth // 8
            wrong = chosen.copy()
            wrong[chosen] = ~seen.inside(pointers.data[chosen], width)
            if wrong.any():
                far = f"{int(wrong.sum())} of {int(chosen.sum())} elements are outside the memory of its tensors"
                seen.outside = seen.outside or f"a load of {seen.kernel}: {far}"
                mask = interpreter.TensorHandle(chosen & ~wrong, mask.dtype)
        return load(self, pointers, mask, *others)

    with (
        patch.object(builder, "create_masked_load", on_load),
        patch.object(builder, "create_int_to_ptr", on_pointer),
        patch.object(executor, "_init_args_hst", on_launch),
    ):
        yield seen


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of a launch, also those of tuples and descriptors."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(base := getattr(argument, "base", argument), torch.Tensor):
            yield base

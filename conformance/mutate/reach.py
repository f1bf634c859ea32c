"""Which expressions of a file a process ran: a fault in any other cannot show.

Python code, and kernels in Triton's interpreter, which are Python code too, are traced instruction by instruction; an
instruction knows the lines and columns of its expression. Compiled kernels carry the same positions in their
intermediate representation.
"""

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch

from conformance.mutate.mutant import Region


class Reach:
    """Notes which regions of some files run.

    Attributes:
        seen: the numbers of the regions that ran since `forget` was last called.
    """

    def __init__(self, regions: Sequence[tuple[str, Region]]) -> None:
        """Regions are pairs of the file's path and the place in it."""
        self.seen: set[int] = set()
        self._every = set(range(len(regions)))
        self._left: dict[CodeType, dict[int, set[int]]] = {}  # as _codes, without what was seen
        self._regions: dict[str, list[tuple[int, Region]]] = {}
        for number, (path, region) in enumerate(regions):
            self._regions.setdefault(path, []).append((number, region))
        self._codes: dict[CodeType, dict[int, set[int]]] = {}  # for each instruction's offset, the regions it is in

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace this thread, in which backward passes then run too, and the kernels that Triton compiles.

        Tracing ends with the last region: traced, the interpreter takes almost twice as long.
        """
        before = sys.gettrace()
        with self._compiled_kernels(), torch.autograd.set_multithreading_enabled(False):
            sys._getframe().f_trace_opcodes = True  # Python 3.12 reads this when tracing starts
            sys.settrace(self._on_call)
            try:
                yield
            finally:
                sys.settrace(before)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self._regions:
            return None
        if code not in self._codes:
            self._codes[code] = self._inside(code)
        if not self._left.setdefault(code, self._codes[code]):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_instruction

    def _on_instruction(self, frame: FrameType, event: str, argument: Any) -> Any:
        found = self._left[frame.f_code].get(frame.f_lasti) if event == "opcode" else None
        if found:
            self.seen |= found
            places = self._left[frame.f_code].items()
            left = {place: rest for place, numbers in places if (rest := numbers - self.seen)}
            self._left[frame.f_code] = left
            if self.seen >= self._every:
                sys.settrace(None)
        return self._on_instruction

    def forget(self) -> None:
        """Empty `seen`."""
        self.seen.clear()
        self._left.clear()

    def _inside(self, code: CodeType) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for index, (line, last, column, end) in enumerate(code.co_positions()):
            if line is None or last is None or column is None or end is None:
                continue
            numbers = {
                n for n, r in self._regions[code.co_filename] if r[:2] <= (line, column) and (last, end) <= r[2:]
            }
            if numbers:
                found[2 * index] = numbers
        return found

    @contextmanager
    def _compiled_kernels(self) -> Iterator[None]:
        """Note the positions in every kernel that Triton compiles or reads from its cache."""
        if "triton" not in sys.modules:
            yield
            return
        compiler: Any = importlib.import_module("triton.compiler.compiler")
        original = compiler.CompiledKernel.__init__

        def init(kernel: Any, *arguments: Any, **keywords: Any) -> None:
            original(kernel, *arguments, **keywords)
            self._note(str(kernel.asm.get("ttir", "")))

        with patch.object(compiler.CompiledKernel, "__init__", init):
            yield

    def _note(self, code: str) -> None:
        places: dict[str, set[tuple[int, int]]] = {}
        for path, line, column in re.findall(r'loc\("([^"]+)":(\d+):(\d+)', code):
            places.setdefault(path, set()).add((int(line), int(column)))
        for path, found in places.items():
            for number, region in self._regions.get(path, ()):
                # Columns begin at 0 in some releases of Triton and at 1 in others.
                if any(region[:2] <= (line, column) <= region[2:] for line, column in found):
                    self.seen.add(number)

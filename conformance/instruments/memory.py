"""Does a call read or write memory outside its tensors? Bands of canaries around inputs and allocations.

`Fence` copies an input between two bands. `fenced` does the same for whatever judged code allocates, and fills it with
poison. It replaces the allocator of the device by memory.cpp, which every allocation reaches: those of torch's
operators, of compiled code, and of calls that are replayed. Where memory.cpp cannot be compiled, `fenced` replaces
torch's allocation functions instead and says so: allocations that do not come from Python are then not seen.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from conformance.case import Case
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, bits, demand_same_bits
from unsloth_ref.accuracy import widen_float8

logger = logging.getLogger(__name__)

BAND_BYTES = 4096  # on either side of an input: more than a kernel overshoots by if it misses a row of a small tile
# Every byte of a band. Around inputs a floating-point element is about 1e16 (in float16 about 200). Around allocations
# it is another one, so that copying an element too many is found; of small magnitude, so that adding is found; and
# positive, so that no kernel waits there for a counter to reach a number.
AROUND_INPUTS, AROUND_ALLOCATIONS = 0x5A, 0x25
# Every byte of uninitialised memory: a large finite number or integer, what fresh memory often holds, and NaN or -1.
# Each pair leaves some faults alone: a minimum ignores NaN and large numbers, a comparison with zero NaN and -1. The -1
# comes last, because a kernel that waits for a counter to reach a number never ends if the counter starts there.
POISONS = (0x7B, 0x00, 0xFF)
_empty = torch.empty  # the original, also while torch's functions are replaced
_FUNCTIONS = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like")
_METHODS = ("new_empty", "new_zeros", "new_full", "new_ones", "new_empty_strided")


class Fence:
    """A tensor in the middle of a larger buffer, between two bands.

    Attributes:
        tensor: the copy.
        interior: its bytes.
    """

    def __init__(self, tensor: Tensor, band: int = AROUND_INPUTS) -> None:
        """Copy the tensor with its strides; `band` is the value of each byte of the bands."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = extent if tensor.numel() else 0
        self._width, self._end = tensor.element_size(), BAND_BYTES + extent * tensor.element_size()
        self._band = band
        self._bytes = _empty(self._end + BAND_BYTES, dtype=torch.uint8, device=tensor.device).fill_(band)
        self.interior = self._bytes[BAND_BYTES : self._end]
        elements = self.interior.view(tensor.dtype)
        self.tensor = elements.as_strided(tensor.shape, tensor.stride())
        if 0 not in tensor.stride():
            self.tensor.copy_(tensor)
        elif tensor.numel():
            elements.copy_(tensor.as_strided((extent,), (1,)))

    def broken(self) -> int | None:
        """Elements from the tensor to the closest write into a band, negative if before it; None without one."""
        before = (self._bytes[:BAND_BYTES] != self._band).nonzero()
        if len(before):
            return (int(before[-1, 0]) - BAND_BYTES) // self._width
        after = (self._bytes[self._end :] != self._band).nonzero()
        return int(after[0, 0]) // self._width + 1 if len(after) else None


class Allocations(ABC):
    """A context in which every allocation is fenced and filled with poison; `fenced` makes one.

    Attributes:
        count: allocations that were seen, once the context has ended.
    """

    def __init__(self, poison: int, band: int) -> None:
        self._poison, self._band = poison, band
        self.count = 0
        self._overrun: str | None = None

    def __enter__(self) -> Allocations:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...

    def demand_unbroken(self) -> None:
        """Raise Failure if, within the context, there was a write outside an allocation."""
        if self._overrun is not None:
            raise Failure(f"wrote outside {self._overrun}")


class _AllocatorOfDevice(Allocations):
    """Allocations by the allocator of memory.cpp."""

    def __init__(self, library: Any, poison: int, band: int) -> None:
        super().__init__(poison, band)
        self._library = library

    def _begin(self) -> None:
        self._library.conformance_fences_on(self._poison, self._band)

    def _end(self) -> None:
        where, size, count = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int64()
        if not self._library.conformance_fences_off(*map(ctypes.byref, (where, size, count))):
            raise Failure("the device stopped answering: memory was accessed that is not allocated")
        self.count = count.value
        if where.value:
            self._overrun = f"an allocation of {size.value} bytes, {_side(where.value, 'bytes')}"


class _FunctionsOfTorch(Allocations):
    """Allocations by replaced functions of torch, those with which Python code allocates."""

    def __init__(self, poison: int, band: int) -> None:
        super().__init__(poison, band)
        self._fences: list[Fence] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def _begin(self) -> None:
        for owner, names in ((torch, _FUNCTIONS), (Tensor, _METHODS)):
            for name in names:
                self._originals.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, self._fenced(getattr(owner, name), "empty" in name))

    def _end(self) -> None:
        for owner, name, original in self._originals:
            if original is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self.count = len(self._fences)
        for fence in self._fences:
            where = fence.broken()
            if where is not None:
                self._overrun = f"an allocation of shape {list(fence.tensor.shape)}, {_side(where)}"

    def _fenced(self, original: Callable[..., Tensor], uninitialised: bool) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            if type(tensor) is not Tensor or tensor.device.type == "meta" or tensor.layout != torch.strided:
                return tensor
            fence = Fence(tensor.detach(), self._band)
            if uninitialised:
                fence.interior.fill_(self._poison)
            self._fences.append(fence)
            return fence.tensor.requires_grad_(tensor.requires_grad)

        return allocate


def fenced(device: str, poison: int = POISONS[0], band: int = AROUND_ALLOCATIONS) -> Allocations:
    """A context in which every allocation on a device lies between bands and is filled with poison.

    Args:
        device: "cpu" or "cuda".
        poison: the value of each byte of uninitialised memory.
        band: the value of each byte of the bands.
    """
    library = _library(device)
    return _FunctionsOfTorch(poison, band) if library is None else _AllocatorOfDevice(library, poison, band)


@cache
def _library(device: str) -> Any:
    """memory.cpp for a device; None if it cannot be compiled, or if torch does not call its allocator."""
    try:
        library = ctypes.CDLL(str(_compiled(device)))
        library.conformance_fences_off.restype = ctypes.c_bool
        if device == "cuda":
            torch.cuda.init()
        with _AllocatorOfDevice(library, POISONS[0], AROUND_ALLOCATIONS) as trial:
            _empty(1, device=device)
        if trial.count != 1:
            raise RuntimeError(f"torch {torch.__version__} does not call an allocator that is installed while it runs")
    except (RuntimeError, OSError) as error:  # no compiler, or no writable directory
        logger.warning("the judge fences and poisons only what Python code allocates, not torch's operators: %s", error)
        return None
    return library


def _compiled(device: str) -> Path:
    """The compiled memory.cpp, in torch's directory for extensions; compiled once, which takes 10 s.

    torch.utils.cpp_extension.load would take a lock, which a worker process that is stopped leaves behind.
    """
    from torch.utils import cpp_extension  # takes half a second

    source, headers = Path(__file__).with_suffix(".cpp"), cpp_extension.include_paths()
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-shared", "-fPIC", str(source), "-lc10"]
    command += [f"-L{Path(torch.__file__).parent / 'lib'}"]
    if device == "cuda":
        package = find_spec("triton")  # has CUDA's headers
        places = (package and package.submodule_search_locations) or ()
        headers = [*headers, *(str(Path(place) / "backends" / "nvidia" / "include") for place in places)]
        command += ["-DCONFORMANCE_CUDA", "-ltorch_cuda", "-lc10_cuda"]
    command += [f"-I{path}" for path in headers]
    facts = repr((command, torch.__version__, source.read_text())).encode()
    target = (
        Path(cpp_extension.get_default_build_root()) / f"conformance_memory_{hashlib.sha256(facts).hexdigest()[:16]}.so"
    )
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent) as place:
            made = Path(place) / target.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{command[0]}: {done.stderr.strip()[-400:]}")
            made.replace(target)  # another process may have been faster
    return target


def demand_unaffected(
    trial: Trial, case: Case, run: Callable[[int], Run], contents: Sequence[int], message: str
) -> None:
    """Raise Failure if results depend on what memory held.

    Results that differ although memory held the same are a finding of the property determinism. If they do so whatever
    memory held, it is only demanded here that the same elements are finite; if they do so for one content, or did so
    once, that they are right.

    Args:
        trial: that of the case.
        case: of the call.
        run: a call while memory holds a given byte.
        contents: the bytes to compare.
        message: states what the results depend on.
    """
    first = run(contents[0])
    for content in contents[1:]:
        second = run(content)
        if _same(first, second):
            continue
        again = [[run(one) for _ in range(4)] for one in (contents[0], content)]
        steady = [all(_same(runs[0], other) for other in runs[1:]) for runs in again]
        if not any(steady):
            demand_same_bits(trial.spec, _finite(first), _finite(second), f"{message}: whether an element is finite")
        elif (all(steady) and not all(_same(first, runs[0]) for runs in again)) or _wrong(trial, case, first, second):
            demand_same_bits(trial.spec, first, second, message)


def _wrong(trial: Trial, case: Case, *runs: Run) -> bool:
    try:
        for run in runs:
            trial.judge(case, run)
    except Failure:
        return True
    return False


def _same(first: Run, second: Run) -> bool:
    pairs = zip((*first.outputs, *first.grads.values()), (*second.outputs, *second.grads.values()), strict=True)
    return all(torch.equal(bits(one), bits(other)) for one, other in pairs)


def _finite(run: Run) -> Run:
    outputs = tuple(widen_float8(output).isfinite() for output in run.outputs)
    return Run(outputs, {name: gradient.isfinite() for name, gradient in run.grads.items()})


def demand_unbroken(name: str, fence: Fence) -> None:
    """Raise Failure if there was a write into the bands around an input."""
    where = fence.broken()
    if where is not None:
        raise Failure(f"wrote outside {name}, {_side(where)}")


def _side(where: int, unit: str = "elements") -> str:
    return f"{-where} {unit} before its start" if where < 0 else f"{where} {unit} past its end"

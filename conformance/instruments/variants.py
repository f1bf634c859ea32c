"""Which variants of its Triton kernels does a call run? Every launch is seen, whoever launches.

A launch has *settings*, on which its machine code and the paths through it depend:

    a constexpr parameter, an option such as num_warps     its value; that of an integer above 4 as for programs
    an integer                                             whether it is 1, which Triton compiles into the code
    a tensor                                               its dtype
    aligned                                                whether Triton may take all addresses and integers that it
                                                           specialises on for multiples of 16; compiled kernels alone
    programs                                               how many: 1, 2 to 15, 16 to 255, ... up to a power of 16

A `Variant` is a kernel with all its settings. `launches` replaces the methods through which Triton launches kernels.
unsloth_fast launches compiled kernels past them, from a dictionary, and replays whole calls below Python. So `launches`
also observes that dictionary, and drops the recorded calls: the first call of each signature is then seen again.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from math import prod
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

Setting = tuple[str, str]
_ONE = ("is 1", "is not 1")  # values of an integer's setting


class Variant(NamedTuple):
    """A kernel and the settings of a launch: (name, value) each, without repetitions, sorted."""

    kernel: str
    settings: tuple[Setting, ...]


class Seen:
    """The launches within a context.

    Attributes:
        variants: of all launches.
        programs: the number of programs of all launches together.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.variants: set[Variant] = set()
        self.programs = 0

    def clear(self) -> None:
        """Forget what was launched before."""
        self.variants.clear()
        self.programs = 0

    def add(self, variant: Variant, programs: int) -> None:
        """Record a launch."""
        self.variants.add(variant)
        self.programs += programs


class _State(threading.local):
    """The last launch of this thread that Triton carried out: the kernel, its settings, places of its integers."""

    last: tuple[str, dict[str, str], dict[str, int]] | None = None


_state = _State()
_current: list[Seen] = []  # of all contexts and threads: backward passes on a GPU have a thread of their own


@contextmanager
def launches(run: bool = True) -> Iterator[Seen]:
    """Within this context all launches of this process are seen; without `run`, kernels are not executed.

    An outer context does not see what an inner one does not execute.
    """
    seen, outer = Seen(), list(_current)
    with ExitStack() as replaced:
        # Without triton nothing can be launched; and an outer context also sees for an inner one.
        if "triton" in sys.modules and not (run and _current):
            for owner in _kernel_types():
                replaced.enter_context(patch.object(owner, "run", _observing(owner.run, run)))
            for module in _modules("_launch", "_compiled"):
                _observe(module)
            if not run:
                replaced.enter_context(through_triton())
            for module in _modules("_replay", "_library") if run else ():
                if module._library.cache_info().currsize and (library := module._library()):
                    library.forget()
        _current[:] = [*outer, seen] if run else [seen]
        try:
            yield seen
        finally:
            _current[:] = outer


@contextmanager
def through_triton() -> Iterator[None]:
    """Within this context unsloth_fast launches all kernels through Triton, and neither records nor replays calls."""
    with ExitStack() as replaced:
        for module in _modules("_launch", "_compiled"):
            replaced.enter_context(patch.object(module, "_intercepted", True))
        for module in _modules("_replay", "_library"):
            replaced.enter_context(patch.object(module, "_library", lambda: None))
        yield


def _kernel_types() -> list[Any]:
    from triton.runtime import interpreter, jit

    found: list[Any] = [jit.JITFunction, interpreter.InterpretedFunction]
    return found


def _modules(name: str, attribute: str) -> list[Any]:
    """unsloth_fast's module of this name, and edited copies of it."""
    return [
        module
        for path, module in list(sys.modules.items())
        if path.endswith(name) and isinstance(module, ModuleType) and attribute in vars(module)
    ]


def _observing(original: Callable[..., Any], run: bool) -> Callable[..., Any]:
    def observing(kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        if not warmup:
            values: dict[str, Any] = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            settings, name = _settings(kernel, values), kernel.fn.__name__
            integers = {name: place for place, name in enumerate(kernel.arg_names) if settings.get(name) in _ONE}
            _state.last = name, settings, integers
            programs: Any = grid(values) if callable(grid) else grid
            _add(name, settings, prod(programs))
            if not run:
                return None
        return original(kernel, *arguments, grid=grid, warmup=warmup, **options)

    return observing


def _add(kernel: str, settings: Mapping[str, str], programs: int) -> None:
    variant = Variant(kernel, tuple(sorted({**settings, "programs": _magnitude(programs)}.items())))
    for seen in _current:
        seen.add(variant, programs)


def _magnitude(count: int) -> str:
    """1 if it is 1, otherwise the power of 16 that it is below."""
    return "1" if count <= 1 else f"<{16 ** ((count.bit_length() + 3) // 4)}"


def _settings(kernel: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a launch by name, without the number of programs."""
    constants, found, addresses = _constants(kernel.fn), {}, []
    for name, value in values.items():
        if name in constants or name not in kernel.arg_names or value is None:
            if isinstance(value, int) and value > 4:
                found[name] = _magnitude(value)
            else:
                found[name] = getattr(value, "__name__", None) or str(value)
        elif isinstance(value, torch.Tensor):
            found[name] = str(value.dtype).removeprefix("torch.")
            addresses.append((name, value.data_ptr()))
        elif isinstance(value, int):
            found[name] = _ONE[value != 1]
            addresses.append((name, value))
    if hasattr(kernel, "params"):
        specialised = {p.name for p in kernel.params if not (p.do_not_specialize or p.do_not_specialize_on_alignment)}
        assumed = [value % 16 == 0 for name, value in addresses if name in specialised]
        found["aligned"] = str(all(assumed)) if assumed else "not assumed"
    return found


@cache
def _constants(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a kernel's constexpr parameters."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if "constexpr" in str(p.annotation))


class _Compiled(dict[Any, Any]):
    """The dictionary from which unsloth_fast launches compiled kernels; each reports what it launches."""

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Add the machine code that Triton has just compiled and launched in this thread."""
        if _state.last is not None:
            compiled, run, *others = default
            default = compiled, _reporting(run, *_state.last), *others
        return super().setdefault(key, default)


def _observe(module: Any) -> None:
    if not isinstance(module._compiled, _Compiled):
        module._compiled = _Compiled(module._compiled)


def _reporting(run: Callable[..., Any], kernel: str, settings: dict[str, str], integers: dict[str, int]) -> Any:
    """The function that launches machine code, with the same signature as Triton's."""

    def reporting(programs: int, *arguments: Any) -> Any:
        if _current:
            values = arguments[8:]  # two more dimensions of the grid, the stream, the code, and what Triton's tools use
            changed = {name: _ONE[values[place] != 1] for name, place in integers.items()}
            _add(kernel, settings | changed, programs)
        return run(programs, *arguments)

    return reporting

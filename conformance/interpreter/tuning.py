"""What kernels ask of a GPU before they are launched: which configuration is the fastest, and what the GPU is.

`tune_without_a_gpu` answers where there is none:

    triton.autotune                 Two of a kernel's configurations are drawn for each of its keys, always the same.
                                    Each runs once, as it would to be timed, and the first of them is chosen. Over
                                    several keys and dtypes every configuration has its turn, and a kernel that must
                                    not run twice is found.
    triton.runtime.driver.active    A GPU of compute capability 8.0 with 4 multiprocessors, whose tensors lie on the
                                    CPU. Where `torch.cuda` is asked, nothing answers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_PROPERTIES = {
    "multiprocessor_count": 4,
    "max_shared_mem": 163 * 1024,
    "max_num_regs": 64 * 1024,
    "warpSize": 32,
    "sm_clock_rate": 1_000_000,
    "mem_clock_rate": 1_000_000,
    "mem_bus_width": 1024,
}


@cache
def tune_without_a_gpu() -> None:
    """Apply the changes to Triton, once per process; imports triton."""
    tuner: Any = importlib.import_module("triton.runtime.autotuner").Autotuner
    tuner.prune_configs = _two_of(tuner.prune_configs)
    tuner.do_bench = property(lambda self: run_once)
    describe_a_gpu()


def describe_a_gpu() -> None:
    """Let Triton describe a GPU, unless there is one: modules of kernels ask for it when they are imported."""
    if not torch.cuda.is_available():
        importlib.import_module("triton.runtime.driver").driver.set_active(AbsentDriver())


def _two_of(prune: Callable[[Any, Any], list[Any]]) -> Callable[[Any, Any], list[Any]]:
    """Replaces `Autotuner.prune_configs`: two of what it returns, drawn by the kernel, its key and the dtypes."""

    @wraps(prune)
    def method(self: Any, keywords: dict[str, Any]) -> list[Any]:
        configs, given = prune(self, keywords), {**self.nargs, **keywords}
        key = [given.get(name) for name in self.keys]
        dtypes = [value.dtype for value in given.values() if isinstance(value, Tensor)]
        return Random(f"{self.base_fn.__name__} {key} {dtypes}").sample(configs, min(2, len(configs)))

    return method


def run_once(kernel_call: Callable[[], object], **how: Any) -> tuple[float, float, float]:
    """Stands for a benchmark: the kernel runs, in no time, so that the first configuration is the fastest."""
    kernel_call()
    return 0.0, 0.0, 0.0


class AbsentDriver:
    """Triton's driver of a GPU that this machine does not have; its tensors lie on the CPU."""

    def __init__(self, target: Any = None, index: int = 0) -> None:
        """For a `GPUTarget`, by default compute capability 8.0, as the device of this index."""
        self._target = target or importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 80, 32)
        self._index = index
        self.utils = SimpleNamespace(get_device_properties=lambda device: dict(_PROPERTIES))

    def get_current_target(self) -> Any:
        """The architecture."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """What has the functions of `torch.cuda`."""
        return torch.cpu

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        """Of that architecture."""
        return divmod(self._target.arch, 10) if self._target.backend == "cuda" else (9, 4)

    def get_current_device(self) -> int:
        """The index."""
        return self._index

    def get_current_stream(self, device: Any = None) -> int:
        """The default stream."""
        return 0

    def get_benchmarker(self) -> Callable[..., tuple[float, float, float]]:
        """What times a kernel for `triton.autotune`."""
        return run_once

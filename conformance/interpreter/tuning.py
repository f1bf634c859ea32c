"""What kernels ask of a GPU before they are launched: which configuration is the fastest, and what the GPU is.

`tune_without_a_gpu` answers where there is none:

    triton.autotune                 Two of a kernel's configurations are drawn for each of its keys, always the same.
                                    Each runs once, as it would to be timed, and the first of them is chosen. So all
                                    configurations are judged, and so is a kernel that must not run twice.
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

_CAPABILITY = (8, 0)
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
    tuner.do_bench = property(lambda self: _run_once)
    importlib.import_module("triton.runtime.driver").driver.set_active(_Driver())


def _two_of(prune: Callable[[Any, Any], list[Any]]) -> Callable[[Any, Any], list[Any]]:
    """Replaces `Autotuner.prune_configs`: two of what it returns, drawn by the kernel, its key and the dtypes."""

    @wraps(prune)
    def method(self: Any, keywords: dict[str, Any]) -> list[Any]:
        configs, given = prune(self, keywords), {**self.nargs, **keywords}
        key = [given.get(name) for name in self.keys]
        dtypes = [value.dtype for value in given.values() if isinstance(value, Tensor)]
        return Random(f"{self.base_fn.__name__} {key} {dtypes}").sample(configs, min(2, len(configs)))

    return method


def _run_once(kernel_call: Callable[[], object], **how: Any) -> tuple[float, float, float]:
    """Stands for a benchmark: the kernel runs, in no time, so that the first configuration is the fastest."""
    kernel_call()
    return 0.0, 0.0, 0.0


class _Driver:
    """Stands for Triton's driver of a GPU."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(get_device_properties=lambda device: dict(_PROPERTIES))

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 80, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return _CAPABILITY

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., tuple[float, float, float]]:
        return _run_once

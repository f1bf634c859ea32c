"""The GPU: times calls on it, and measures its peak rates.

A host time is that of one call on an idle device, between CUDA events, including the launch. A device time is that of
many calls in one CUDA graph, without launches. Both start after a flush of the L2 cache. The flush writes, so that the
cache is in the state that it has in training: it holds other data, some of which is not yet written back.
"""

import gc
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.bench.sampler import Times, interleave
from conformance.trial import Caught

FLUSH_BYTES = 2**28  # over four times the L2 cache of an H200
LARGE_BYTES = 2**30
MATMUL = 8192
NVIDIA_SMI_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class Rates:
    """Peak rates of the card, measured in this process.

    Attributes:
        copy: bytes per second, read and written, of a large copy.
        matmul: floating-point operations per second of a large bfloat16 matrix product on random data.
    """

    copy: float
    matmul: float


class Card:
    """The current CUDA device."""

    device = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self.name: str = properties.name
        self.cache_bytes: int = properties.L2_cache_size
        self._memory: int = properties.total_memory
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._side = torch.cuda.Stream()  # one for all captures, which then share its cached memory
        self._start, self._stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time_alone(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of a call that starts on an idle device, after the flush, and its result.

        The time includes the launch if the device is faster. Queued behind a slow contender, the launch would be
        hidden, and by an amount that depends on that contender.
        """
        torch.cuda.synchronize()
        return self.time_queued(call)

    def time_queued(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of a call that is launched while the flush still runs, and its result."""
        self._flush.zero_()
        self._start.record()
        found = call()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop), found

    def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], Any], Any] | str:
        """Capture what a call launches in a CUDA graph.

        The call is tried first with synchronisation forbidden: a failed capture leaves the allocator in a bad state.

        Args:
            body: the call; it must have run before, so that nothing is compiled here.

        Returns:
            A function that replays the graph, and the result, whose memory each replay overwrites; or the reason why
            there is no graph.
        """
        self._side.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(self._side), Caught() as caught:
            torch.cuda.set_sync_debug_mode("error")
            body()
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > self._memory // 2:
            torch.cuda.empty_cache()
        if caught.error is not None:
            return _first_line(caught.error)
        graph, found = torch.cuda.CUDAGraph(), None
        with torch.cuda.stream(self._side), Caught() as caught:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                found = body()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return (graph.replay, found) if caught.error is None else _first_line(caught.error)

    def peak_mebibytes(self, call: Callable[[], Any]) -> float:
        """Peak memory of a call, above what was allocated before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def free_memory(self) -> None:
        """Release all unreferenced memory, including that of exceptions in reference cycles with their tracebacks."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def rates(self) -> Rates:
        """Measure the peak rates of the card."""
        source = torch.empty(LARGE_BYTES, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        a, b = self._factors()
        calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
        seconds = {name: 1e-3 * times.median for name, (times, _) in self._interleave(calls).items()}
        return Rates(
            copy=2 * LARGE_BYTES / seconds["copy"],
            matmul=2 * MATMUL**3 / seconds["matmul"],
        )

    def _interleave(self, calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[Times, Any]]:
        for call in calls.values():
            call()
        return interleave(calls, self.time_queued)

    def _factors(self) -> tuple[Tensor, Tensor]:
        a, b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        return a, b

    def state(self) -> dict[str, Any]:
        """Driver version and SM clock under load, from nvidia-smi; None if it is not available."""
        query = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties().uuid}"]
        query += ["--query-gpu=driver_version,clocks.sm", "--format=csv,noheader,nounits"]
        unknown: dict[str, Any] = {"driver": None, "sm_clock_mhz": None}
        try:
            with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
                self._load_while(lambda: asked.poll() is None)
                if asked.poll() is None:
                    asked.kill()
                words = [word.strip() for word in asked.communicate()[0].split(",")]
        except OSError:
            return unknown
        if asked.returncode != 0 or len(words) != 2:
            return unknown
        return {"driver": words[0], "sm_clock_mhz": int(words[1]) if words[1].isdigit() else None}

    def _load_while(self, running: Callable[[], bool]) -> None:
        a, b = self._factors()
        until = time.monotonic() + NVIDIA_SMI_TIMEOUT_SECONDS
        while running() and time.monotonic() < until:
            for _ in range(14):
                torch.mm(a, b)
            torch.cuda.synchronize()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]

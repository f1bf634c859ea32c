"""The card under the clock: how one call is timed on it, and what it can do at best.

Host time is that of one call on an idle device: CUDA events around it, launch included. Device time is that of many
calls held in one CUDA graph, where no launch shows. Either begins behind a flush of the L2 cache. The flush writes, so
that a call finds there what it finds in training: other data, some of it still to be written back.
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
from conformance.trial import Raised

FLUSH_BYTES = 2**28  # over four times an H200's L2
LARGE_BYTES = 2**30
MATMUL = 8192
PATIENCE = 20  # seconds for nvidia-smi


@dataclass(frozen=True)
class Rates:
    """What the card does at best, measured in this process.

    Attributes:
        copy: bytes a second, read and written, of a large copy.
        matmul: floating-point operations a second of a large bfloat16 matrix product, on random data.
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
        self._side = torch.cuda.Stream()  # one for all captures, so that they share its cached memory
        self._start, self._stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def host(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of a call that begins on an idle device behind the flush, and what it gave.

        Where the device would have been done sooner, the launch shows: queued behind a slow contender it would be
        hidden, by as much as that one was slow.
        """
        torch.cuda.synchronize()
        return self.queued(call)

    def queued(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds of a call that is launched while the flush still runs, and what it gave."""
        self._flush.zero_()
        self._start.record()
        found = call()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop), found

    def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], Any], Any] | str:
        """Hold what a call launches in a CUDA graph.

        The call is tried first with waiting forbidden: a capture that fails leaves the allocator in disorder.

        Args:
            body: has run before, so that nothing is compiled here.

        Returns:
            What replays it, and what it gave, in memory that each replay writes again; or why there is no graph.
        """
        self._side.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(self._side), Raised() as raised:
            torch.cuda.set_sync_debug_mode("error")
            body()
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > self._memory // 2:
            torch.cuda.empty_cache()
        if raised.error is not None:
            return _first_line(raised.error)
        graph, found = torch.cuda.CUDAGraph(), None
        with torch.cuda.stream(self._side), Raised() as raised:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                found = body()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return (graph.replay, found) if raised.error is None else _first_line(raised.error)

    def peak_mebibytes(self, call: Callable[[], Any]) -> float:
        """Memory that a call takes at its peak, above what was there before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def tidy(self) -> None:
        """Give back memory that nothing holds, not even an exception whose traceback holds itself."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def rates(self) -> Rates:
        """Measure what the card does at best."""
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
        return interleave(calls, self.queued)

    def _factors(self) -> tuple[Tensor, Tensor]:
        a, b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        return a, b

    def state(self) -> dict[str, Any]:
        """Driver version and SM clock under load, as nvidia-smi tells them; None where there is none."""
        query = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties().uuid}"]
        query += ["--query-gpu=driver_version,clocks.sm", "--format=csv,noheader,nounits"]
        nothing: dict[str, Any] = {"driver": None, "sm_clock_mhz": None}
        try:
            with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
                self._load_while(lambda: asked.poll() is None)
                if asked.poll() is None:
                    asked.kill()
                words = [word.strip() for word in asked.communicate()[0].split(",")]
        except OSError:
            return nothing
        if asked.returncode != 0 or len(words) != 2:
            return nothing
        return {"driver": words[0], "sm_clock_mhz": int(words[1]) if words[1].isdigit() else None}

    def _load_while(self, going: Callable[[], bool]) -> None:
        a, b = self._factors()
        until = time.monotonic() + PATIENCE
        while going() and time.monotonic() < until:
            for _ in range(14):
                torch.mm(a, b)
            torch.cuda.synchronize()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]

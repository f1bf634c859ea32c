"""GPU times: CUDA events around one call, host launch included, cold L2, contenders interleaved round by round.

Sequential measurement turns a warming card into a difference between contenders; interleaved, all see the same card.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles

import torch

FLUSH_BYTES = 2**28  # over four times an H200's L2
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Times:
    """Milliseconds of many calls of one contender."""

    samples: tuple[float, ...]

    @property
    def spread(self) -> tuple[float, float, float]:
        """20 %, 50 % and 80 % quantiles."""
        fifths = quantiles(self.samples, n=10)
        return fifths[1], fifths[4], fifths[7]

    @property
    def median(self) -> float:
        """The middle."""
        return self.spread[1]


def interleave(contenders: Mapping[str, Callable[[], object]], seconds: float = 0.3) -> dict[str, Times]:
    """Time each contender once a round, until one of them has taken this many seconds, at least 20 rounds.

    Every call begins on an idle device, behind the flush, so that the time of its launch shows where the device would
    have been done sooner: queued behind a slow contender it would be hidden, by as much as that one was slow.

    Args:
        contenders: calls to time, by name; each has run before, so that nothing is compiled here.
        seconds: of device time for the slowest.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    slowest = max(_sample(call, flush) for call in contenders.values())
    rounds = max(20, min(500, int(seconds * 1e3 / max(slowest, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(_sample(call, flush))
    return {name: Times(tuple(values)) for name, values in samples.items()}


def _sample(call: Callable[[], object], flush: torch.Tensor) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    flush.zero_()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def peak_mebibytes(call: Callable[[], object]) -> float:
    """Memory that a call takes at its peak, above what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_rate() -> float:
    """Bytes read and written a second by a large copy: the roof for whatever is bound by memory."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * COPY_BYTES / (times.median * 1e-3)


def matmul_rate() -> float:
    """Floating-point operations a second of a large bfloat16 matrix product on random data."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / (interleave({"matmul": lambda: a @ b})["matmul"].median * 1e-3)

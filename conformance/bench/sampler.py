"""GPU times: CUDA events around one call, host launch included, cold L2, contenders interleaved round by round.

Sequential measurement turns a warming card into a difference between contenders; interleaved, all see the same card.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

import torch

FLUSH_BYTES = 2**28  # over four times an H200's L2
COPY_BYTES = 2**30

Span = tuple[torch.cuda.Event, torch.cuda.Event]


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

    As in `triton.testing.do_bench`, nothing is waited for between calls: the time of a launch shows where the device
    would have been done sooner.

    Args:
        contenders: calls to time, by name; each has run before, so that nothing is compiled here.
        seconds: of device time for the slowest.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    slowest = max(_read([_record(call, flush)])[0] for call in contenders.values())
    rounds = max(20, min(500, int(seconds * 1e3 / max(slowest, 1e-3))))
    events: dict[str, list[Span]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            events[name].append(_record(call, flush))
    return {name: Times(tuple(_read(spans))) for name, spans in events.items()}


def _record(call: Callable[[], object], flush: torch.Tensor) -> Span:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    call()
    stop.record()
    return start, stop


def _read(spans: Sequence[Span]) -> list[float]:
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in spans]


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

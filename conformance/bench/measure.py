"""Times backends on the shapes of the specs: all backends on one shape, then the next; results are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from conformance import backends, operations
from conformance.bench.card import Card, Rates
from conformance.bench.contender import Contender
from conformance.bench.sampler import Times, interleave
from conformance.bench.table import Row
from conformance.case import DTYPES, LAYOUTS, Case
from conformance.operations import PROJECT, Source
from conformance.spec import Spec
from conformance.specs import specs
from conformance.trial import Trial

CACHES = 4  # all sets of inputs together, in units of the L2 cache: a set is evicted before its next use
FEWEST_SETS, MOST_SETS = 2, 16
NOISE = 1.03  # error of a median: that of the copy varies by 2 % between runs on an idle H200
# Reading can be faster than copying, because a copy switches the direction of the memory bus. The pins of an H200 allow
# 1.16 times the copy rate.
READING = 1.16
# The data sheet of an H200 gives 989 TFLOP/s; at its power limit a product of random matrices reaches 705.
# Products of other numbers need less power and can be faster.
UNTHROTTLED = 1.4


@dataclass(frozen=True)
class Work:
    """The least work of a pass.

    Attributes:
        bytes: bytes that must move.
        flops: floating-point operations of its matrix products.
    """

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        """The work of both passes."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Prepared:
    """All backends on one shape, ready to be timed.

    Attributes:
        op: the operation.
        title: the name of the shape, its sizes and options.
        work: of "forward", "backward" and both, "full".
        contenders: by the name of the backend.
        timed: those that can be timed.
        sets: sets of inputs that each uses in turn.
    """

    op: str
    title: str
    work: Mapping[str, Work]
    contenders: Mapping[str, Contender]
    timed: Mapping[str, Contender]
    sets: int


@dataclass(frozen=True)
class Bench:
    """The settings that all measurements of one process share.

    Attributes:
        card: the GPU.
        rates: its peak rates.
        names: of the backends; operations that one does not define are skipped.
        dtype: of the inputs.
        source: of the operation, if it comes from the command line.
    """

    card: Card
    rates: Rates
    names: Sequence[str]
    dtype: str
    source: Source = PROJECT

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The specs of the operations that can be timed."""
        return operations.specs(self.source) if self.source else specs()

    def shapes(self, ops: Sequence[str]) -> Iterator[list[Row]]:
        """Measure every shape of these operations; yields one list of rows per shape."""
        for op in ops:
            for shape in specs()[op].speed.shapes:
                rows = self.measure(op, shape)
                if rows:
                    yield rows

    def measure(self, op: str, shape: str) -> list[Row]:
        """Measure one shape; returns one row per backend."""
        with static_shapes():
            rows = self._measure(self.prepare(op, shape))
        self.card.free_memory()
        return rows

    def prepare(self, op: str, shape: str) -> Prepared:
        """Judge every backend on the inputs of one shape, and make it ready to be timed."""
        card, spec = self.card, self.specs[op]
        case = bench_case(spec, shape)
        spec = replace(spec, grads=spec.speed.shapes[shape].get("grads", spec.grads))
        judged = {name: backends.load(name, card.device, self.source) for name in self.names}
        trials = {
            name: Trial(spec, one.functions[op], DTYPES[self.dtype], card.device, card.device)
            for name, one in judged.items()
            if op in one.functions
        }
        inputs = spec.inputs(case, DTYPES[self.dtype], card.device, source=card.device)
        inputs |= {name: LAYOUTS[spec.speed.layout](inputs[name]) for name in spec.grads if name in inputs}
        passes = zip(spec.speed.bytes(inputs), spec.speed.flops(inputs, dict(case.options), spec.grads), strict=True)
        forward, backward = (Work(*needed) for needed in passes)
        contenders = {name: Contender(t, case, inputs, ours=is_ours(name)) for name, t in trials.items()}
        card.free_memory()
        timed = {n: c for n, c in contenders.items() if c.usable and not (c.cheat or (c.failure and is_ours(n)))}
        moved = forward.bytes or sum(tensor.nbytes for tensor in inputs.values()) or 1
        sets = max(FEWEST_SETS, min(MOST_SETS, math.ceil(CACHES * card.cache_bytes / moved)))
        for contender in timed.values():
            contender.prepare(sets)
        timed = {name: contender for name, contender in timed.items() if contender.usable}
        work = {"forward": forward, "backward": backward, "full": forward + backward}
        return Prepared(spec.op, f"{shape} {_words(case)}", work, contenders, timed, sets)

    def _measure(self, prepared: Prepared) -> list[Row]:
        card, timed = self.card, prepared.timed
        samples: dict[str, dict[str, Times]] = {name: {} for name in timed}
        self._time_calls(timed, samples)
        peaks = {name: card.peak_mebibytes(contender.full) for name, contender in timed.items()}
        graphs = self._time_graphs(timed, samples, prepared.sets)
        for contender in timed.values():
            contender.check_times()  # last, because it changes a set
        return [
            self.row(prepared, name, samples.get(name, {}), peaks.get(name), graphs.get(name))
            for name in prepared.contenders
        ]

    def _time_calls(self, timed: Mapping[str, Contender], samples: dict[str, dict[str, Times]]) -> None:
        """Time one call at a time, including its launch."""
        for what in ("forward", "full"):
            for name, (times, last) in interleave(
                {n: getattr(c, what) for n, c in timed.items()}, self.card.time_alone
            ).items():
                samples[name][what] = times
                timed[name].compare(f"last timed {what}", *(last if what == "full" else (last,)))

    def _time_graphs(
        self, timed: Mapping[str, Contender], samples: dict[str, dict[str, Times]], sets: int
    ) -> dict[str, str]:
        """Time all sets in one CUDA graph; returns the reasons why contenders have none."""
        refused: dict[str, str] = {}
        for what, body in (("device_forward", "every_forward"), ("device_full", "every_full")):
            replays: dict[str, Callable[[], Any]] = {}
            results: dict[str, Any] = {}
            for name, contender in timed.items():
                captured = self.card.capture(getattr(contender, body))
                if isinstance(captured, str):
                    refused[name] = f"no CUDA graph ({captured})"
                else:
                    replays[name], results[name] = captured
            for name, (times, _) in interleave(replays, self.card.time_queued).items():
                samples[name][what] = Times(tuple(sample / sets for sample in times.samples))
                timed[name].replay_over_nan(replays[name], results[name])
                last = results[name][-1]
                timed[name].compare("replayed", *(last if what == "device_full" else (last,)))
        return refused

    def row(
        self, prepared: Prepared, name: str, samples: dict[str, Times], peak: float | None, refused: str | None
    ) -> Row:
        """The row of one backend, after its times have been checked.

        Args:
            prepared: what was timed.
            name: of the backend.
            samples: its times, by kind.
            peak: MiB of memory of a full call.
            refused: why there is no CUDA graph.
        """
        c = prepared.contenders[name]
        remarks = (c.remark if c.remark != c.failure else None, refused)
        row = Row(
            op=prepared.op,
            shape=prepared.title,
            dtype=self.dtype,
            backend=name,
            peak_mebibytes=None if c.cheat else peak,
            error_use=c.error_use,
            wrong=c.cheat or c.failure,
            remark="; ".join(filter(None, remarks)) or None,
        )
        row = self._with_times(row, {} if c.cheat else samples, prepared.work)
        return replace(row, failed=row.failed or c.cheat is not None)

    def _with_times(self, row: Row, samples: dict[str, Times], work: Mapping[str, Work]) -> Row:
        if not samples or (row.wrong and is_ours(row.backend)):
            return replace(row, failed=is_ours(row.backend))
        medians = {what: times.median for what, times in samples.items()}
        if {"device_forward", "device_full"} <= medians.keys():
            medians["device_backward"] = max(0.0, medians["device_full"] - medians["device_forward"])
        works = {what: work[what.removeprefix("device_")] for what in medians}
        fractions = {what: self._roofline(works[what]) / (1e-3 * max(t, 1e-9)) for what, t in medians.items()}
        floors = {what: 1e3 * self._floor(works[what], cached="device" not in what) for what in medians}
        impossible = [what for what in samples if medians[what] < floors[what]]
        if impossible:
            worst = max(impossible, key=lambda what: fractions[what])
            wrong = f"{worst}: {100 * fractions[worst]:.0f} % of the roofline: not all the work was done"
            return replace(row, wrong=wrong, peak_mebibytes=None, failed=True)
        if "device_backward" in floors and medians["device_backward"] < floors["device_backward"]:
            del fractions["device_backward"]  # the forward pass did part of it; the sum has been checked
        return replace(
            row,
            **{what: times.spread for what, times in samples.items()},
            device_backward=medians.get("device_backward"),
            roofline=fractions,
            samples=samples,
        )

    def _roofline(self, work: Work) -> float:
        """Seconds for the bytes at the copy rate or for the products at the matmul rate, whichever is longer."""
        return max(work.bytes / self.rates.copy, work.flops / self.rates.matmul)

    def _floor(self, work: Work, cached: bool) -> float:
        """Seconds below which the work cannot be complete.

        `cached` is for a call that is timed by itself: writes that stay in the L2 cache are not timed, and
        its backward pass may read from the cache what its forward pass has read.
        """
        moved = work.bytes - 2 * self.card.cache_bytes * cached
        return max(moved / (READING * self.rates.copy), work.flops / (UNTHROTTLED * self.rates.matmul)) / NOISE


def bench_case(spec: Spec, shape: str) -> Case:
    """The case of a shape in a spec's bench: its sizes and options."""
    values = {name: value for name, value in spec.speed.shapes[shape].items() if name != "grads"}
    sizes = tuple((name, values.pop(name)) for name in spec.drawing.sizes)
    return Case(sizes).with_options(values)


def is_ours(name: str) -> bool:
    """Whether speed is shown only for correct results: for all backends except other people's kernels."""
    return name not in backends.PEERS


def _words(case: Case) -> str:
    sizes = "x".join(str(size) for _, size in case.sizes)
    return " ".join([sizes, *(f"{name}={value}" for name, value in case.options)])


@contextmanager
def static_shapes() -> Iterator[None]:
    """Let torch.compile compile every shape statically, not only the first."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield

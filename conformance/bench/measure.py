"""Backends against each other on the shapes of the specs, all on one shape at a time, judged before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from conformance import backends
from conformance.bench.card import Card, Rates
from conformance.bench.contender import Contender
from conformance.bench.sampler import Times, interleave
from conformance.bench.table import Row
from conformance.case import LAYOUTS, Case
from conformance.search import DTYPES
from conformance.spec import Spec, specs
from conformance.trial import Trial

CACHES = 4  # sets of inputs hold at least this many times the L2 cache, so that none is there when its turn comes
FEWEST_SETS, MOST_SETS = 2, 16
NOISE = 1.03  # a median may lie this far from the truth: the copy's own, from run to run on an idle H200, 2 %
# Reading alone may be faster than copying, which turns the bus around: an H200's pins could do 1.16 times as much.
READING = 1.16
# On paper the tensor cores of an H200 do 989 TFLOP/s, of which its power leaves a product of random numbers 705; other
# numbers take less.
UNTHROTTLED = 1.4


@dataclass(frozen=True)
class Work:
    """What a pass cannot do without.

    Attributes:
        bytes: that must move.
        flops: floating-point operations of its matrix products.
    """

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        """Of both."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Bench:
    """What all measurements of one process share.

    Attributes:
        card: what times.
        rates: what it does at best.
        names: the backends; what one does not define is left out.
        dtype: of the inputs.
    """

    card: Card
    rates: Rates
    names: Sequence[str]
    dtype: str

    def shapes(self, ops: Sequence[str]) -> Iterator[list[Row]]:
        """Measure every shape of these operations, one list of rows a shape."""
        for op in ops:
            for shape in specs()[op].bench:
                rows = self.rows(op, shape)
                if rows:
                    yield rows

    def rows(self, op: str, shape: str) -> list[Row]:
        """Measure one shape."""
        spec = specs()[op]
        case = bench_case(spec, shape)
        spec = replace(spec, grads=spec.bench[shape].get("grads", spec.grads))
        judged = {name: backends.load(name, self.card.device) for name in self.names}
        trials = {
            name: Trial(spec, one.functions[op], DTYPES[self.dtype], self.card.device, one.truncates, self.card.device)
            for name, one in judged.items()
            if op in one.functions
        }
        with static_shapes():
            return self._measure(spec, f"{shape} {_words(case)}", case, trials)

    def _measure(self, spec: Spec, title: str, case: Case, trials: Mapping[str, Trial]) -> list[Row]:
        card = self.card
        inputs = spec.inputs(case, DTYPES[self.dtype], card.device, source=card.device)
        inputs |= {name: LAYOUTS[spec.bench_layout](inputs[name]) for name in spec.grads if name in inputs}
        passes = zip(spec.bytes(inputs), spec.flops(inputs, dict(case.options), spec.grads), strict=True)
        forward, backward = (Work(*needed) for needed in passes)
        least = {"forward": forward, "backward": backward, "full": forward + backward}
        contenders = {name: Contender(t, case, inputs, ours=is_ours(name)) for name, t in trials.items()}
        card.tidy()
        timed = {n: c for n, c in contenders.items() if c.runs and not (c.red and is_ours(n))}
        sets = max(FEWEST_SETS, min(MOST_SETS, math.ceil(CACHES * card.cache_bytes / forward.bytes)))
        for contender in timed.values():
            contender.prepare(sets)
        timed = {name: contender for name, contender in timed.items() if contender.runs}
        samples: dict[str, dict[str, Times]] = {name: {} for name in timed}
        self._time_calls(timed, samples)
        peaks = {name: card.peak_mebibytes(contender.full) for name, contender in timed.items()}
        graphs = self._time_graphs(timed, samples, sets)
        rows = [
            self._row(
                Row(spec.op, title, self.dtype, name, error_use=c.error_use, red=c.red, peak_mebibytes=peaks.get(name)),
                samples.get(name, {}),
                least,
                "; ".join(filter(None, (c.note if c.note != c.red else None, graphs.get(name)))) or None,
            )
            for name, c in contenders.items()
        ]
        del inputs, contenders, timed
        card.tidy()
        return rows

    def _time_calls(self, timed: Mapping[str, Contender], samples: dict[str, dict[str, Times]]) -> None:
        """One call at a time, launch included."""
        for what in ("forward", "full"):
            for name, (times, last) in interleave(
                {n: getattr(c, what) for n, c in timed.items()}, self.card.host
            ).items():
                samples[name][what] = times
                timed[name].check(f"last timed {what}", *(last if what == "full" else (last,)))

    def _time_graphs(
        self, timed: Mapping[str, Contender], samples: dict[str, dict[str, Times]], sets: int
    ) -> dict[str, str]:
        """All sets in one CUDA graph; returns why a contender has none."""
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
            for name, (times, _) in interleave(replays, self.card.queued).items():
                samples[name][what] = Times(tuple(sample / sets for sample in times.samples))
                timed[name].replay(replays[name], results[name])
                last = results[name][-1]
                timed[name].check("replayed", *(last if what == "device_full" else (last,)))
        return refused

    def _row(self, row: Row, samples: dict[str, Times], least: Mapping[str, Work], note: str | None) -> Row:
        if not samples or (row.red and is_ours(row.backend)):
            return replace(row, note=note, failed=is_ours(row.backend))
        medians = {what: times.median for what, times in samples.items()}
        if {"device_forward", "device_full"} <= medians.keys():
            medians["device_backward"] = max(0.0, medians["device_full"] - medians["device_forward"])
        works = {what: least[what.removeprefix("device_")] for what in medians}
        shares = {what: self._roofline(works[what]) / (1e-3 * max(t, 1e-9)) for what, t in medians.items()}
        floors = {what: 1e3 * self._floor(works[what], cached="device" not in what) for what in medians}
        impossible = [what for what in samples if medians[what] < floors[what]]
        if impossible:
            worst = max(impossible, key=lambda what: shares[what])
            red = f"{worst}: {100 * shares[worst]:.0f} % of the roofline: not all the work was done"
            return replace(row, red=red, note=note, peak_mebibytes=None, failed=True)
        if "device_backward" in floors and medians["device_backward"] < floors["device_backward"]:
            del shares["device_backward"]  # the forward pass did its work: the sum has been looked at
        return replace(
            row,
            **{what: times.spread for what, times in samples.items()},
            device_backward=medians.get("device_backward"),
            roofline=shares,
            note=note,
            samples=samples,
        )

    def _roofline(self, least: Work) -> float:
        """Seconds that the card's copy takes for the bytes, or its matrix product for the operations: the longer."""
        return max(least.bytes / self.rates.copy, least.flops / self.rates.matmul)

    def _floor(self, least: Work, cached: bool) -> float:
        """Seconds below which not all the work can have been done.

        Where one call is timed by itself, what it leaves in the L2 cache is never written back, and its gradients may
        find there what its forward pass read: cached grants both.
        """
        moved = least.bytes - 2 * self.card.cache_bytes * cached
        return max(moved / (READING * self.rates.copy), least.flops / (UNTHROTTLED * self.rates.matmul)) / NOISE


def bench_case(spec: Spec, shape: str) -> Case:
    """A shape of a spec's bench as a case: its sizes, and options where it names any."""
    values = {name: value for name, value in spec.bench[shape].items() if name != "grads"}
    sizes = tuple((name, values.pop(name)) for name in spec.sizes)
    return Case(sizes).with_options(values)


def is_ours(name: str) -> bool:
    """Whether it is held to the rule that a speed is shown for right results alone: all but other people's kernels."""
    return name not in backends.PEERS


def _words(case: Case) -> str:
    sizes = "x".join(str(size) for _, size in case.sizes)
    return " ".join([sizes, *(f"{name}={value}" for name, value in case.options)])


@contextmanager
def static_shapes() -> Iterator[None]:
    """torch.compile takes every shape as it is, the first as well as the last."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield

"""One side of a gate: a process that runs the code of its own checkout and measures on command.

    python -m conformance.gate.side

A command is a line of JSON on stdin, its answer one on stdout; whatever the backend prints goes to stderr.

    {"do": "start", "backend": ..., "source": {...}}           -> {"meta": {...}}
    {"do": "shapes", "op": ...}                                -> {"shapes": [...]}
    {"do": "prepare", "op": ..., "shape": ..., "dtype": ...}   -> {"kinds": {kind: milliseconds}, "wrong": ...}
    {"do": "sample", "kind": ..., "count": ...}                -> {"milliseconds": [...]}
    {"do": "finish"}                                           -> {"row": {...}}

The row is that of `conformance bench`: times of results that were judged before they were timed and again afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from conformance import backends
from conformance.bench.card import Card
from conformance.bench.measure import Bench, Prepared, static_shapes
from conformance.bench.sampler import Times
from conformance.operations import Source
from conformance.reporting.results_file import SCHEMA, versions

Answer = dict[str, Any]

FIRST_CALLS = 3


class Job:
    """One shape of the backend under judgement: judged on construction, timed, judged again by `finish`."""

    def __init__(self, bench: Bench, op: str, shape: str) -> None:
        self._bench, self._prepared = bench, bench.prepare(op, shape)
        self._calls: dict[str, Callable[[], tuple[float, Any]]] = {}
        self._graphs: dict[str, tuple[Callable[[], Any], Any]] = {}
        self._samples: dict[str, list[float]] = {}
        self._last: dict[str, Any] = {}
        self._peak: float | None = None
        self._refused: str | None = None
        (self._name,) = self._prepared.contenders
        contender = self._prepared.contenders[self._name]
        if self._prepared.timed and not contender.failure:
            self._ready(self._prepared)

    def _ready(self, prepared: Prepared) -> None:
        card, contender = self._bench.card, prepared.timed[self._name]
        for kind in ("forward", "full"):
            self._calls[kind] = partial(card.time_alone, getattr(contender, kind))
        self._peak = card.peak_mebibytes(contender.full)
        for kind, body in (("device_forward", contender.every_forward), ("device_full", contender.every_full)):
            captured = card.capture(body)
            if isinstance(captured, str):
                self._refused = f"no CUDA graph ({captured})"
            else:
                self._graphs[kind] = captured
                self._calls[kind] = partial(card.time_queued, captured[0])

    def ready(self) -> Answer:
        """The kinds of time that can be sampled, with milliseconds of a call or replay; why there are none.

        The shortest of a few: other processes may be using the card, and a graph is uploaded by its first replay.
        """
        contender = self._prepared.contenders[self._name]
        kinds = {kind: min(call()[0] for _ in range(FIRST_CALLS)) for kind, call in self._calls.items()}
        return {"kinds": kinds, "wrong": contender.cheat or contender.failure}

    def sample(self, kind: str, count: int) -> Answer:
        """Time this many calls, after one that is not counted: another process had the card."""
        self._calls[kind]()
        found = [self._one(kind) for _ in range(count)]
        self._samples.setdefault(kind, []).extend(found)
        return {"milliseconds": found}

    def _one(self, kind: str) -> float:
        milliseconds, self._last[kind] = self._calls[kind]()
        return milliseconds / (self._prepared.sets if kind in self._graphs else 1)

    def finish(self) -> Answer:
        """Judge the results of the last timed calls, on changed inputs too; returns the row."""
        contender = self._prepared.contenders[self._name]
        for kind in self._samples:
            last = self._last[kind]
            if kind in self._graphs:
                replay, results = self._graphs[kind]
                contender.replay_over_nan(replay, results)
                last = results[-1]
            contender.compare(f"last timed {kind}", *(last if kind.endswith("full") else (last,)))
        if self._calls:
            contender.check_times()
        samples = {kind: Times(tuple(found)) for kind, found in self._samples.items()}
        row = self._bench.row(self._prepared, self._name, samples, self._peak, self._refused)
        return {"row": row.as_dict()}


class Server:
    """Answers commands; the first is "start"."""

    def __init__(self, card: Callable[[], Card]) -> None:
        self._make_card = card
        self._bench: Bench | None = None
        self._job: Job | None = None

    def answer(self, do: str, **command: Any) -> Answer:
        """The answer to one command. Raises ValueError for one that is not allowed now."""
        if do == "start":
            return self._start(**command)
        if do in ("shapes", "prepare") and self._bench is not None:
            return getattr(self, f"_{do}")(self._bench, **command)
        if do in ("sample", "finish") and self._bench is not None and self._job is not None:
            answer = getattr(self._job, do)(**command)
            if do == "finish":  # its memory is free for the other processes, which judge next
                self._job = None
                self._bench.card.free_memory()
            return answer
        raise ValueError(f"do: got {do!r}; allowed: start, then shapes or prepare, then sample or finish")

    def _start(self, backend: str, source: dict[str, Any]) -> Answer:
        words: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in source.items()}
        card = self._make_card()  # before the backend is imported, which could choose the allocator
        rates, state = card.rates(), card.state()
        self._bench = Bench(card, rates, (backend,), "", Source(**words))
        backends.load(backend, card.device, self._bench.source)
        peak = {"copy_bytes_per_second": rates.copy, "matmul_flops_per_second": rates.matmul}
        return {"meta": {"schema": SCHEMA, "versions": versions(), "gpu": card.name, **state, **peak}}

    def _shapes(self, bench: Bench, op: str) -> Answer:
        (backend,) = bench.names
        defined = op in bench.specs and op in backends.load(backend, bench.card.device, bench.source).functions
        return {"shapes": list(bench.specs[op].speed.shapes) if defined else []}

    def _prepare(self, bench: Bench, op: str, shape: str, dtype: str) -> Answer:
        self._job = Job(replace(bench, dtype=dtype), op, shape)
        return self._job.ready()


def main(card: Callable[[], Card] = Card) -> None:
    """Serve on stdin and stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    server = Server(card)
    with static_shapes():
        for line in sys.stdin:
            answers.write(json.dumps(server.answer(**json.loads(line)), allow_nan=False) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()

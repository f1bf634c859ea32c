"""How often is a gate wrong on this card? Gates of one operation and shape whose correct verdict is known.

A gate compares the base with itself, with kernels that are slower by a known share, or with a wrong kernel. It calls
`compare_times`, as `conformance gate` does. Processes take seconds to start, so the gates of a generation share them. A
second set of processes has to see a change again, as always.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from conformance.gate.job import TIMED_DTYPE, Measuring, Report, Request, compare_times
from conformance.gate.sides import Checkout, Side, Unavailable
from conformance.gate.statistics import SIDES
from conformance.reporting import results_file
from tests.judge.power.planted import WRONG

BASE, WRONG_KERNEL = "base", "wrong"  # heads of gates; any other head is the share by which its kernels are slower
CYCLE = (0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 0.02, 0.0, 0.0, 0.0)  # the planted share of each generation
MINUTES = 0.5  # for one gate; all rounds of the shapes below take less
BACKEND, LOG = "planted_kernels", "planted.jsonl"

Shape = tuple[str, str]  # operation and the name of a shape in its spec

# Shapes that are judged quickly. Launching a sleep takes a microsecond, so slowdowns by 2 % need the longer passes.
LONG: tuple[Shape, ...] = (
    *(("swiglu", shape) for shape in ("llama-3.2-1b", "llama-3.1-8b")),
    *(("geglu", shape) for shape in ("tanh", "none", "gemma-2-9b")),
    ("cross_entropy", "llama-2-7b"),
    ("add_rms_norm", "llama-3.1-70b"),
)
QUICK: tuple[Shape, ...] = (
    *LONG,
    *((op, shape) for op in ("rms_norm", "add_rms_norm") for shape in ("llama-3.2-1b", "llama-3.1-8b", "short")),
    ("rms_norm", "llama-3.1-70b"),
    *(("layer_norm", shape) for shape in ("phi-2", "gpt-j-6b", "starcoder2-15b")),
    *(("rope", shape) for shape in ("llama-3.1-8b", "llama-3.2-1b", "long")),
    ("lora_linear", "llama-3.2-1b q, o, few"),
)

Sets = Callable[[float], AbstractContextManager[Mapping[str, Measuring]]]  # starts three processes, for a planted share


@dataclass(frozen=True)
class Generation:
    """Gates that share processes.

    Attributes:
        number: from 0.
        share: by which the kernels of the head are slower.
        gates: the head of each gate, its operation and shape.
    """

    number: int
    share: float
    gates: Sequence[tuple[str, Shape]]

    @property
    def weight(self) -> int:
        """Proportional to its duration: a change is timed twice."""
        return len(self.gates) * (2 if self.share else 1)


def generations(gates: int, first: int = 0) -> list[Generation]:
    """Plan the gates; each generation with a planted slowdown also has a gate of a wrong kernel.

    Args:
        gates: how many, without those of wrong kernels; 8 of 10 have the base as head, 1 of 10 each slowdown.
        first: the number of the first generation; plans of other numbers have other orders of shapes.
    """
    plan = []
    for index, share in enumerate(CYCLE):
        size = gates * (index + 1) // len(CYCLE) - gates * index // len(CYCLE)
        shapes = list(LONG if share else QUICK)
        random.Random(first + index).shuffle(shapes)
        head = str(share) if share else BASE
        chosen = [(head, shape) for shape in islice(cycle(shapes), size)]
        wrong = [(WRONG_KERNEL, (WRONG, "short"))] if share else []
        plan.append(Generation(first + index, share, [*wrong, *chosen]))
    return plan


class Shared:
    """A process that several gates use, each as if it had started it; records the samples."""

    def __init__(self, side: Measuring, started: dict[str, Any], alone: bool) -> None:
        """Takes what the process answered to "start".

        If `alone`, it prepares after the others are ready, because calibrating its kernels measures times.
        """
        self._side, self._started, self._alone = side, started, alone
        self._held: dict[str, Any] | None = None
        self.shape = ""
        self.samples: dict[str, list[float]] = {}

    def send(self, do: str, **command: Any) -> None:
        """Send a command."""
        if self._alone and do == "prepare":
            self._held = {"do": do, **command}
        else:
            self._side.send(do, **command)

    def receive(self) -> dict[str, Any]:
        """Wait for its answer."""
        if self._held is not None:
            self._side.send(**self._held)
            self._held = None
        return self._side.receive()

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Send a command and wait; the process starts once, and offers only the shape of the gate."""
        if do == "shapes":
            return {"shapes": [self.shape]}
        if do == "start":
            return self._started
        answer = self._side.ask(do, **command)
        if do == "sample":
            self.samples.setdefault(command["kind"], []).append(median(answer["milliseconds"]))
        return answer


@dataclass
class Processes:
    """The processes of one generation: one set times first, another times changes again; started when needed."""

    start: Callable[[], AbstractContextManager[Mapping[str, Measuring]]]
    stack: ExitStack
    clock: Callable[[], float]
    alone: bool
    sets: list[dict[str, Shared]] = field(default_factory=list)
    seconds: float = 0.0  # of starting

    def set(self, index: int) -> dict[str, Shared]:
        """The set of this number."""
        if index == len(self.sets):
            begin = self.clock()
            sides = self.stack.enter_context(self.start())
            for name in SIDES:  # at the same time, so that their peak rates mean nothing
                sides[name].send("start", backend=BACKEND, source={})
            self.sets.append(
                {name: Shared(sides[name], sides[name].receive(), self.alone and name == "head") for name in SIDES}
            )
            self.seconds += self.clock() - begin
        return self.sets[index]


@dataclass
class Measurement:
    """Runs gates until the plan or the time ends.

    Attributes:
        sets: starts processes.
        end: the time of `clock` when the gates must have ended; a gate that takes longer than all before it exceeds it.
        path: the file of results, which is written after each gate.
        shares: returns the measured slowdowns of the planted kernels, see tests/judge/power/planted.py.
        clock: seconds.
        meta: of the file of results; the card and the versions are added.
        results: one object per gate.
    """

    sets: Sets
    end: float
    path: Path
    shares: Callable[[], list[dict[str, Any]]]
    clock: Callable[[], float] = time.monotonic
    meta: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)

    def run(self, plan: Sequence[Generation]) -> None:
        """Run the gates of a plan; each generation gets its share of the time, so that every head has gates."""
        begin, starting, sets, longest = self.clock(), 0.0, 0, 0.0
        for index, generation in enumerate(plan):
            share = generation.weight / sum(one.weight for one in plan[index:])
            end = self.clock() + share * (self.end - self.clock())
            with ExitStack() as stack:
                start = partial(self.sets, generation.share)
                processes = Processes(start, stack, self.clock, alone=generation.share > 0)
                for head, shape in generation.gates:
                    ready = self.clock() + longest
                    if ready >= end if processes.sets else ready + starting / max(sets, 1) >= self.end:
                        break
                    found = self._gate(processes, generation, head, shape)
                    longest = max(longest, found["seconds"])
                    self.results.append(found)
                    self._write(begin, starting + processes.seconds, sets + len(processes.sets))
                    if found["lost"]:
                        break  # its processes can no longer answer
                starting, sets = starting + processes.seconds, sets + len(processes.sets)
        self._write(begin, starting, sets)

    def _write(self, begin: float, starting: float, sets: int) -> None:
        spent = {"seconds": self.clock() - begin, "seconds_of_starting": starting, "sets_of_processes": sets}
        meta = self.meta | {"planted": self.shares(), **spent}
        results_file.write(self.path, meta, self.results)

    def _gate(self, processes: Processes, generation: Generation, head: str, shape: Shape) -> dict[str, Any]:
        op, name = shape
        found: dict[str, Any] = {"head": head, "generation": generation.number, "op": op, "shape": name, "lost": None}
        report, used, begin, starting = Report(), list[Mapping[str, Shared]](), self.clock(), processes.seconds
        number = count()

        def start() -> AbstractContextManager[Mapping[str, Measuring]]:
            sides = processes.set(next(number))
            for side in sides.values():
                side.shape, side.samples = name, {}
            used.append(sides)
            return nullcontext(sides)

        try:
            processes.set(0)
            minutes = min(MINUTES, max(0.0, self.end - self.clock()) / 60)
            request = Request([op], BACKEND, "cuda", dtypes=(TIMED_DTYPE,), minutes=minutes)
            compare_times(start, request, [(op, TIMED_DTYPE)], report, self.clock)
        except Unavailable as why:
            found["lost"] = str(why)
        self.meta |= report.meta
        (row,) = report.rows or [{"verdict": None, "no_speed": found["lost"], "times": {}}]
        found |= {key: row[key] for key in ("verdict", "no_speed", "times")}
        found["differences"] = [differences(sides) for sides in used]
        return found | {"seconds": self.clock() - begin - (processes.seconds - starting)}


def differences(sides: Mapping[str, Shared]) -> dict[str, dict[str, float]]:
    """The log ratios of the three processes, by kind of time.

    Returns:
        "again": the median of the second process of the base to the first; "head": that of the head to the first;
        "round": the standard deviation of "again" in one round, from the median absolute deviation.
    """
    found = {}
    for kind, base in sides["base"].samples.items():
        again, head = (sides[name].samples.get(kind, []) for name in ("again", "head"))
        if not len(base) == len(again) == len(head):  # a process ended in a round
            continue
        noise = [math.log(other / one) for one, other in zip(base, again, strict=True)]
        middle = median(noise)
        found[kind] = {
            "again": middle,
            "head": median(math.log(other / one) for one, other in zip(base, head, strict=True)),
            "round": 1.4826 * median(abs(one - middle) for one in noise),
        }
    return found


def real(folder: Path, share: float) -> AbstractContextManager[Mapping[str, Measuring]]:
    """Start three processes on the card; base and head are folders with kernels, the fast ones if the share is 0."""
    for name, planted in (("base", 0.0), ("head", share)):
        root = folder / f"{share}" / name
        root.mkdir(parents=True, exist_ok=True)
        log = str(folder / LOG)
        lines = [
            "from pathlib import Path",
            "from tests.judge.power.planted import kernels",
            f"globals().update(kernels({planted}, Path({log!r})))",
        ]
        text = "\n".join(lines) if share else "from unsloth_fast.kernels import *"
        (root / f"{BACKEND}.py").write_text(text + "\n")
    checkouts = {
        name: Checkout(
            name, f"{share:.0%} slower" if name == "head" else "fast", folder, folder / f"{share}" / name, folder
        )
        for name in ("base", "head")
    }
    return _sides({"base": checkouts["base"], "again": checkouts["base"], "head": checkouts["head"]})


@contextmanager
def _sides(checkouts: Mapping[str, Checkout]) -> Iterator[Mapping[str, Measuring]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(closing(Side(one))) for name, one in checkouts.items()}


def measure(gates: int, minutes: float, first: int, path: Path) -> None:
    """Run gates on the card.

    Args:
        gates: how many.
        minutes: time limit of all gates.
        first: the number of the first generation.
        path: the file of results.
    """
    with tempfile.TemporaryDirectory(prefix="gate-power-") as name:
        folder = Path(name).resolve()
        log = folder / LOG

        def shares() -> list[dict[str, Any]]:
            return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

        end = time.monotonic() + 60 * minutes
        meta = {"gpu": None, "versions": results_file.versions(), "commit": results_file.commit()}
        Measurement(partial(real, folder), end, path, shares, meta=meta).run(generations(gates, first))

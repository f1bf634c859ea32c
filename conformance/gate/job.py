"""The whole comparison: both sides are judged, compiled and timed in turns; with a ledger, one side is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from conformance.gate import verdict
from conformance.gate.ledger import Ledger, results_of
from conformance.gate.sides import Checkout, Side, Unavailable, verb
from conformance.gate.statistics import SIDES, Pool
from conformance.gate.verdict import Row
from conformance.operations import PROJECT, Source
from conformance.properties import PROPERTIES
from conformance.reporting import results_file

SAMPLE_MILLISECONDS, FEWEST_CALLS, MOST_CALLS = 5.0, 3, 20  # of one side in one round
TIMED_DTYPE = "bfloat16"
HUGE = "int64_offsets"
BASES = ("base", "again")  # the sides that run the base

Job = tuple[str, str, str]  # operation, shape and dtype
Found = tuple[dict[str, Any], list[dict[str, Any]]]  # meta and results, as in a file of the judge


@dataclass(frozen=True)
class Request:
    """What to compare, in the words of the command line.

    Attributes:
        ops: operations; none for all.
        backend: under judgement, on both sides.
        base_backend: its name on the base, if that is another one.
        device: "cpu" or "cuda"; times need the latter.
        judge: further options of `run`, for both sides.
        dtypes: none for checks in all dtypes, and times and fingerprints in TIMED_DTYPE.
        targets: of fingerprints, for which None means all.
        minutes: for all rounds of times.
        mutants: of each operation, planted on both sides; 0 for none.
        rise: of the budget use that is allowed, as a fraction of the budget.
        source: of the operation, if it comes from the command line.
    """

    ops: Sequence[str]
    backend: str
    device: str
    judge: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    targets: Sequence[str] | None = None
    minutes: float = 20.0
    mutants: int = 0
    rise: float = verdict.BUDGET_RISE
    source: Source = PROJECT
    base_backend: str | None = None

    def of(self, side: str) -> Request:
        """What to ask of the base, or of the head."""
        return replace(self, backend=self.base_backend or self.backend) if side in BASES else self

    @property
    def timed(self) -> Sequence[str]:
        """The dtypes of times and fingerprints."""
        return self.dtypes or (TIMED_DTYPE,)

    def run(self) -> list[str]:
        """The command line that judges."""
        where = ["--backend", self.backend, "--device", self.device]
        dtypes = ["--dtype", *self.dtypes] if self.dtypes else []
        return ["run", *self.ops, *where, *dtypes, *self.judge, *self.source.words()]

    def mutate(self, ops: Sequence[str]) -> list[str]:
        """The command line that plants faults; without a choice of dtypes and properties what is cheap."""
        where = ["--backend", self.backend, "--device", self.device, "--sample", str(self.mutants)]
        dtypes = ["--dtype", *(self.dtypes or ("float32",))]
        # What allocates gigabytes waits for its turn, a minute per mutant.
        cheap = [] if "--property" in self.judge else ["--property", *(one for one in PROPERTIES if one != HUGE)]
        judge = list(self.judge)
        if "--deviations" in judge:  # a check that the unchanged backend fails is left out anyway
            del judge[(place := judge.index("--deviations")) : place + 2]
        return ["mutate", *ops, *where, *dtypes, *judge, *cheap]

    def fingerprint(self, ops: Sequence[str], dtype: str) -> list[str]:
        """The command line that compiles."""
        targets = ["--target", *self.targets] if self.targets else []
        return ["fingerprint", *ops, "--backend", self.backend, "--dtype", dtype, *targets]


@dataclass
class Report:
    """What was found.

    Attributes:
        rows: see conformance/gate/verdict.py.
        sentences: regressions that belong to no row.
        notes: what could not be compared, and why.
        meta: of the head: versions, card, peak rates.
    """

    rows: list[Row] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def regressions(self) -> list[str]:
        """All of them, each once."""
        rows = [sentence for row in self.rows for sentence in row["regressions"]]
        return list(dict.fromkeys((*self.sentences, *rows)))

    def write(self, path: Path) -> None:
        """Write the file of results."""
        results_file.write(path, self.meta | {"notes": self.notes, "regressions": self.regressions}, self.rows)

    def attempt(self, run: Callable[[], Found], fatal: bool = False) -> Found:
        """Run what a side may be unable to do; then this is noted, or if fatal a regression, and nothing is found."""
        try:
            return run()
        except Unavailable as why:
            (self.sentences if fatal else self.notes).append(str(why))
            return {}, []


class Measuring(Protocol):
    """A process that measures on command; see conformance/gate/side.py."""

    def send(self, do: str, **command: Any) -> None:
        """Send a command."""
        ...

    def receive(self) -> dict[str, Any]:
        """Wait for its answer."""
        ...

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Both."""
        ...


def against_base(base: Checkout, head: Checkout, request: Request) -> Report:
    """Compare two checkouts.

    Raises:
        Unavailable: the head cannot be judged, and the base neither.
        RevisionError: the backend is not of this repository.
    """
    report = Report()
    report.meta, old = report.attempt(lambda: _judged(base, request))  # if the head cannot be judged
    try:
        report.meta, new = _judged(head, request)
    except Unavailable as why:
        if not old:
            raise
        report.sentences.append(str(why))
        return report
    report.rows += verdict.properties(old, new, request.rise)
    for dtype in request.timed if old else ():
        if ops := _compiling(request, new):
            words = {side.name: side.words(request.of(side.name).fingerprint(ops, dtype)) for side in (base, head)}
            _, one = report.attempt(lambda words=words: verb(base, words["base"]))
            _, other = report.attempt(lambda words=words: verb(head, words["head"]), fatal=bool(one))
            report.rows += verdict.fingerprints(one, other) if one else []
    if request.mutants and not request.source:
        _mutants(
            base, head, request, sorted({op for op, dtype in verdict.right(old) & verdict.right(new) if dtype}), report
        )
    pairs = [pair for pair in verdict.right(old) & verdict.right(new) if pair[1] in request.timed]
    if request.device == "cuda" and request.minutes > 0:
        wrong = {(one["op"], one["dtype"]) for one in (*old, *new) if one["verdict"] == "fail"}
        report.notes += [f"{op} / {dtype}: no speed: a check fails" for op, dtype in sorted(wrong, key=str)]
    if request.device == "cuda" and request.minutes > 0 and pairs:
        try:
            compare_times(lambda: _processes(base, head), request, sorted(pairs), report)
        except Unavailable as why:
            (report.sentences if why.side == "head" else report.notes).append(str(why))
    return report


def _mutants(base: Checkout, head: Checkout, request: Request, ops: Sequence[str], report: Report) -> None:
    """Plant the same faults on both sides."""
    if not ops:
        return
    _progress(f"planting {request.mutants} faults in each of {', '.join(ops)}, on both sides")
    _, old = report.attempt(lambda: verb(base, base.words(request.of("base").mutate(ops))))
    _, new = report.attempt(lambda: verb(head, head.words(request.mutate(ops))))
    if old and new:
        rows, note = verdict.mutants(old, new)
        report.rows += rows
        report.notes.append(note)


@contextmanager
def _processes(base: Checkout, head: Checkout) -> Iterator[Mapping[str, Measuring]]:
    checkouts = {"base": base, "again": base, "head": head}
    with ExitStack() as stack:
        yield {name: stack.enter_context(closing(Side(checkouts[name]))) for name in SIDES}


def against_ledger(head: Checkout, request: Request, ledger: Ledger) -> Report:
    """Compare one checkout with a ledger.

    Raises:
        Unavailable: it cannot be judged.
    """
    report = Report()
    found = [_judged(head, request)]
    report.meta, judged = found[0]
    right = verdict.right(judged)
    for dtype in request.timed:
        if compiled := _compiling(request, judged):
            words = request.fingerprint(compiled, dtype)
            found.append(report.attempt(lambda words=words: verb(head, head.words(words))))
        ops = sorted(op for op, one in right if one == dtype)
        if request.device == "cuda" and request.minutes > 0 and ops and not request.source:
            words = ["bench", *ops, "--backend", request.backend, "--dtype", dtype]
            found.append(report.attempt(lambda words=words: verb(head, head.words(words))))
            report.meta |= found[-1][0]
    known = {which[3:] for which in ledger.entries if which[2] == request.backend}
    for _, results in found:
        report.rows += [_alone(result, known) for result in results]
    report.sentences += ledger.regressions(results_of(report.meta, [row["head"] for row in report.rows]))
    recorded = ledger.operations(request.backend)
    lost = sorted((recorded & set(request.ops or recorded)) - {result["op"] for result in judged})
    report.sentences += [f"{op}: is lost: the ledger has it" for op in lost]
    return report


def _alone(result: dict[str, Any], known: Container[tuple[Any, ...]]) -> Row:
    """A row without a base; its verdict says whether it fails, if it is not known that it was right."""
    kind = "time" if "roofline" in result else "fingerprint" if "kernel" in result else "property"
    about = {name: result.get(name, 0) for name in verdict.KEYS[kind]}
    fails = result.get("verdict") == "fail" or result.get("problem") or result.get("wrong")
    wrong = "wrong" if fails and verdict.key(kind, about) not in known else None
    return {"kind": kind, **about, "verdict": wrong, "regressions": [], "base": None, "head": result}


def _judged(checkout: Checkout, request: Request) -> Found:
    asked = request.of(checkout.name)
    checkout.demand_own(asked.backend)
    _progress(f"judging the {checkout.name}, {checkout.revision}")
    return verb(checkout, checkout.words(asked.run()))


def _compiling(request: Request, judged: Iterable[Mapping[str, Any]]) -> list[str]:
    """The operations that launch Triton kernels, for fingerprints; none if none are asked for."""
    ops = dict.fromkeys(one["op"] for one in judged if one.get("coverage") is not None)
    return [] if request.source or request.targets == () else list(ops)


def compare_times(
    start: Callable[[], AbstractContextManager[Mapping[str, Measuring]]],
    request: Request,
    pairs: Sequence[tuple[str, str]],
    report: Report,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Time what is right on both sides, shape by shape; then what changed again, in new processes.

    Args:
        start: starts the processes, by the names in SIDES.
        request: of which backend.
        pairs: operation and dtype.
        report: gets a row per shape.
        clock: seconds.

    Raises:
        Unavailable: a process ended. Rows of the shapes before it are in the report.
    """
    pool, found = Pool(), dict[Job, tuple[dict[str, Any], dict[str, Any]]]()
    end = clock() + 60 * request.minutes
    try:
        with start() as sides:
            report.meta |= _started(sides, request)
            jobs = list(_jobs(sides, pairs))
            for number, job in enumerate(jobs):
                _progress(f"timing {' '.join(job)}, {number + 1} of {len(jobs)}")
                deadline = clock() + max(0.0, end - clock()) / (len(jobs) - number)
                found[job] = _time(sides, pool, job, None, lambda deadline=deadline: clock() > deadline)
        changed = {job: kinds for job in jobs if not _any_wrong(found[job]) and (kinds := pool.changed(" ".join(job)))}
        if changed:
            with start() as sides:
                _started(sides, request)
                for job, kinds in changed.items():
                    _progress(f"timing {' '.join(job)} again, in new processes")
                    rows = _time(sides, pool, job, kinds, lambda: clock() > end)
                    found[job] = rows if _any_wrong(rows) else found[job]
    finally:  # at the end: every comparison adds to what is known about noise
        report.rows += [verdict.times(*rows, pool.decisions(" ".join(job))) for job, rows in found.items()]


def _started(sides: Mapping[str, Measuring], request: Request) -> dict[str, Any]:
    """The card as the head sees it; one side after the other measures its peak rates."""
    source = asdict(request.source)
    asked = {name: request.of(name).backend for name in SIDES}
    started = {name: sides[name].ask("start", backend=asked[name], source=source)["meta"] for name in SIDES}
    theirs, ours = (started[name].get("schema") for name in ("base", "head"))
    if theirs != ours:
        raise Unavailable("base", f"its results have schema {theirs}, those of the head {ours}: no times")
    return started["head"]


def _jobs(sides: Mapping[str, Measuring], pairs: Sequence[tuple[str, str]]) -> Iterator[Job]:
    """The shapes that both sides know."""
    for op, dtype in pairs:
        known = sides["base"].ask("shapes", op=op)["shapes"]
        yield from ((op, shape, dtype) for shape in sides["head"].ask("shapes", op=op)["shapes"] if shape in known)


def _any_wrong(rows: Iterable[Mapping[str, Any]]) -> bool:
    return any(row["wrong"] for row in rows)


def _time(
    sides: Mapping[str, Measuring], pool: Pool, job: Job, wanted: Sequence[str] | None, late: Callable[[], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time these kinds of time of one shape, or all of them; returns the rows of the base and of the head."""
    op, shape, dtype = job
    for name in SIDES:
        sides[name].send("prepare", op=op, shape=shape, dtype=dtype)
    ready = [sides[name].receive() for name in SIDES]
    slowest = {
        kind: max(one["kinds"][kind] for one in ready)
        for kind in ready[0]["kinds"]
        if all(kind in one["kinds"] for one in ready) and (wanted is None or kind in wanted)
    }
    counts = {
        kind: max(FEWEST_CALLS, min(MOST_CALLS, round(SAMPLE_MILLISECONDS / max(milliseconds, 1e-3))))
        for kind, milliseconds in slowest.items()
    }

    def sample(side: str, kind: str) -> float:
        return median(sides[side].ask("sample", kind=kind, count=counts[kind])["milliseconds"])

    if counts and not _any_wrong(ready):
        pool.time(" ".join(job), list(counts), sample, late)
    rows = {name: sides[name].ask("finish")["row"] for name in SIDES}
    return rows["base"], rows["head"]


def _progress(line: str) -> None:
    sys.stderr.write(f"conformance gate: {line}\n")
    sys.stderr.flush()

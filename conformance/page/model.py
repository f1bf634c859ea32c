"""What is in the files of results of run, coverage, bench, mutate and gate? The part that the formats show."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from conformance.bench.table import Row
from conformance.case import DTYPES
from conformance.properties import PROPERTIES
from conformance.reporting.report import repro
from unsloth_ref.checks import counted

Kind = Literal["run", "coverage", "bench", "mutate", "gate"]


@dataclass(frozen=True)
class Meta:
    """What the results of a file depend on; the fields are JSON keys, None or empty where a verb writes none.

    Attributes:
        schema: of the file; another one is refused.
        versions: of Python, torch, Triton, CUDA and peers.
        source: the options of the command line that name an operation of your own.
        absent: peers that are not installed, and why.
        kill_rate: the killed part of the mutants that are not equivalent.
        base, head: the revisions of a gate.
        regressions, notes: the sentences of a gate: what fails, and what a reader should know.
    """

    schema: Literal[2] = 2
    versions: dict[str, str | None] = field(default_factory=dict)
    backend: str | None = None
    device: str | None = None
    gpu: str | None = None
    profile: str | None = None
    commit: str | None = None
    source: tuple[str, ...] = ()
    not_defined: tuple[str, ...] = ()
    driver: str | None = None
    sm_clock_mhz: float | None = None
    copy_bytes_per_second: float | None = None
    matmul_flops_per_second: float | None = None
    absent: dict[str, str] = field(default_factory=dict)
    kill_rate: float | None = None
    base: str | None = None
    head: str | None = None
    regressions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """The verdict on one property, operation and dtype, as conformance.running.search.Result writes it.

    Attributes:
        missed: the pairs of settings that `coverage` found not run, {"pair", "case"}.
    """

    op: str
    property: str
    verdict: Literal["pass", "fail", "skip", "xfail"]
    dtype: str | None = None
    budget_use: float | None = None
    examples: int = 0
    case: str | None = None
    message: str | None = None
    coverage: float | None = None
    missed: tuple[dict[str, str], ...] = ()

    def name(self) -> str:
        """Operation, property and dtype."""
        return " / ".join((self.op, self.property, *((self.dtype,) if self.dtype else ())))

    def first_line(self) -> str:
        """The first line of the message, empty without one."""
        return (self.message or "").partition("\n")[0]

    def again(self, meta: Meta) -> str | None:
        """The command that runs the smallest failing case again."""
        return _judge_again((self.op, self.dtype, self.property, self.case), meta)


def _judge_again(words: tuple[str | None, ...], meta: Meta) -> str | None:
    """The command that judges a case again; None without a case, which comes last."""
    if words[-1] is None or meta.backend is None or meta.device is None:
        return None
    return repro(" ".join(filter(None, words)), meta.backend, meta.device, meta.source)


@dataclass(frozen=True)
class Mutant:
    """A planted fault and its verdict, as conformance.mutate.report writes it."""

    op: str
    mutant: str
    kind: str
    verdict: Literal["killed", "raised", "survived", "unreached", "same bits", "equivalent"]
    diff: str
    same_bits: bool = False
    killed_by: tuple[tuple[str | None, ...], ...] = ()
    reason: str | None = None

    @property
    def survives(self) -> bool:
        """Whether no property found it, and it was not confirmed to be no fault."""
        return self.verdict in ("survived", "unreached")

    def again(self, meta: Meta) -> str | None:
        """The command that examines it again."""
        if meta.backend is None or meta.device is None:
            return None
        words = [self.op, "--backend", meta.backend, "--device", meta.device]
        words += ["--profile", meta.profile] if meta.profile else []
        return shlex.join(["python", "-m", "conformance", "mutate", *words, "--mutant", self.mutant])


@dataclass(frozen=True)
class Ratio:
    """A time of the head divided by that of the base, and its interval."""

    ratio: float
    low: float
    high: float

    def shown(self) -> str:
        """The ratio and its interval, with three decimals."""
        return f"{self.ratio:.3f} [{self.low:.3f} {self.high:.3f}]"


@dataclass(frozen=True)
class Head:
    """The smallest failing case on the head of a gate, if it is a check that fails."""

    case: str | None = None


@dataclass(frozen=True)
class Compared:
    """The verdict of a gate on one check, mutant, kernel or shape.

    Attributes:
        kind: "property", "fingerprint", "time" or "mutant".
        verdict: such as "same", "regressed", "lost" or "FASTER"; None where there is no speed.
        regressions: sentences.
        times: by kind of time.
        no_speed: why there is none.
    """

    op: str
    kind: str
    verdict: str | None
    regressions: tuple[str, ...]
    property: str | None = None
    mutant: str | None = None
    shape: str | None = None
    dtype: str | None = None
    kernel: str | None = None
    target: str | None = None
    index: int | None = None
    times: dict[str, Ratio] = field(default_factory=dict)
    no_speed: str | None = None
    head: Head | None = None

    def name(self) -> str:
        """The words that its sentences begin with."""
        parts = (self.op, self.property, self.mutant, self.shape, self.dtype, self.kernel, self.target, self.index)
        return " / ".join(str(part) for part in parts if part is not None)

    def again(self, meta: Meta) -> str | None:
        """The command that runs the smallest failing case of the head again."""
        return _judge_again((self.op, self.dtype, self.property, self.head.case), meta) if self.head else None

    def ratios(self) -> str:
        """All times in one line."""
        return ", ".join(f"{kind} {one.shown()}" for kind, one in self.times.items())


@dataclass(frozen=True)
class Results:
    """The results of one file; the fields of other kinds are empty."""

    name: str
    kind: Kind
    meta: Meta
    checks: tuple[Check, ...] = ()
    rows: tuple[Row, ...] = ()
    mutants: tuple[Mutant, ...] = ()
    compared: tuple[Compared, ...] = ()

    @property
    def title(self) -> str:
        """The kind of results, the backend and the device."""
        begins = {
            "run": "Run of",
            "coverage": "Coverage of",
            "mutate": "Mutants of",
            "bench": "Speed",
            "gate": "Gate of",
        }
        where = self.meta.gpu or self.meta.device
        return " ".join(filter(None, (begins[self.kind], self.meta.backend, f"on {where}" if where else "")))

    @property
    def ops(self) -> set[str]:
        """The operations and training pieces."""
        return {one.op for one in (*self.checks, *self.rows, *self.mutants, *self.compared)}

    @property
    def ran(self) -> list[Check]:
        """The checks that were not skipped."""
        return [check for check in self.checks if check.verdict != "skip"]

    @property
    def judged(self) -> int:
        """The number of checks that ran, of times, of mutants and of comparisons."""
        timed = sum(row.full is not None or row.failed for row in self.rows)
        return len(self.ran) + timed + len(self.mutants) + len(self.compared) + self.regressed

    @property
    def failed(self) -> int:
        """The number of failed checks, meaningless times, surviving mutants and regressions."""
        checks = sum(check.verdict == "fail" for check in self.checks)
        return (
            checks + sum(row.failed for row in self.rows) + sum(one.survives for one in self.mutants) + self.regressed
        )

    @property
    def others(self) -> int:
        """How many failures of a gate are no regressions: the base fails too, or a ledger does not record them."""
        return sum(one.verdict == "wrong" for one in self.compared)

    @property
    def stack(self) -> str:
        """The versions, the driver and clock, the profile and the commit, in one line."""
        meta = self.meta
        words = [f"{what} {version}" for what, version in meta.versions.items() if version]
        clock = f"{meta.sm_clock_mhz:.0f} MHz" if meta.sm_clock_mhz else None
        commit = meta.commit and meta.commit[:12]
        others = {
            "base": meta.base and meta.base[:12],
            "head": meta.head and meta.head[:12],
            "driver": meta.driver,
            "SM clock": clock,
            "profile": meta.profile,
            "commit": commit,
        }
        words += [f"{what} {value}" for what, value in others.items() if value]
        return ", ".join(words)

    @property
    def regressed(self) -> int:
        """How many regressions a gate found."""
        return len(self.meta.regressions)

    @property
    def summary(self) -> str:
        """The counts in one sentence."""
        if self.kind == "bench":
            timed = [row for row in self.rows if row.full is not None]
            wrong = sum(row.wrong is not None for row in timed)
            return f"{len(timed)} of {len(self.rows)} timed, {wrong} of them with wrong results"
        if self.kind == "gate":
            words = Counter(one.verdict for one in self.compared if one.verdict and one.verdict.isupper())
            found = [counted(self.regressed, "regression")]
            found += [counted(self.others, "other failure")] if self.others else []
            return ", ".join([*found, *(f"{n} {word}" for word, n in sorted(words.items()))])
        if self.kind == "mutate":
            judged = [one for one in self.mutants if one.verdict not in ("same bits", "equivalent")]
            return f"{len(judged) - self.failed} of {len(judged)} mutants killed ({percent(self.meta.kill_rate)})"
        ran, skipped = len(self.ran), len(self.checks) - len(self.ran)
        known = sum(check.verdict == "xfail" for check in self.checks)
        ends = [f"{skipped} skipped"] * bool(skipped) + [counted(known, "known deviation")] * bool(known)
        return ", ".join([f"{self.failed} of {ran} checks failed", *ends])


def verdict(files: Sequence[Results]) -> tuple[str, bool | None]:
    """The verdict on all files in a few words, and whether it is a good one; None for neither good nor bad."""
    failed, others = sum(file.failed for file in files), sum(file.others for file in files)
    if failed:
        return f"{failed} failed", False
    if others:
        return f"nothing got worse, {counted(others, 'other failure')}", None
    return ("nothing failed", True) if any(file.judged for file in files) else ("nothing was judged", None)


def percent(fraction: float | None) -> str:
    """A fraction as "31 %", from 10 on as "12x"; empty for None."""
    return "" if fraction is None else f"{100 * fraction:.3g} %" if fraction < 10 else f"{fraction:.2g}x"


def in_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """The names without repetitions: known ones in the order of `known`, then the others as they come."""
    found = dict.fromkeys(names)
    return [name for name in known if name in found] + [name for name in found if name not in known]


def dtypes_of(checks: Iterable[Check]) -> list[str]:
    """The dtypes of checks, in the order of the judge."""
    return in_order((check.dtype for check in checks if check.dtype), list(DTYPES))


def properties_of(checks: Iterable[Check]) -> list[str]:
    """The properties of checks, in the order of the judge."""
    return in_order((check.property for check in checks), list(PROPERTIES))


def failures(checks: Sequence[Check]) -> dict[tuple[str, str], list[Check]]:
    """The checks that failed, by operation and property, each in the order of dtypes."""
    found: dict[tuple[str, str], list[Check]] = {}
    dtypes, properties = dtypes_of(checks), properties_of(checks)
    failed = [check for check in checks if check.verdict == "fail"]
    for check in sorted(failed, key=lambda c: (c.op, properties.index(c.property), [c.dtype != d for d in dtypes])):
        found.setdefault((check.op, check.property), []).append(check)
    return found

"""What is in the files of results? Reads those of run, coverage, bench and mutate, and checks every field."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from conformance.bench.table import Row
from conformance.properties import PROPERTIES
from conformance.report import repro
from conformance.search import DTYPES

T = TypeVar("T")
Kind = Literal["run", "coverage", "bench", "mutate"]
FORBIDDEN = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")  # in XML 1.0, and useless in HTML


class FileError(Exception):
    """A file that cannot be shown; the message names it, what was seen and what is allowed."""


@dataclass(frozen=True)
class Meta:
    """What the results of a file depend on; the fields are JSON keys, None or empty where a verb writes none.

    Attributes:
        versions: of Python, torch, Triton, CUDA and peers.
        source: the options of the command line that name an operation of your own.
        absent: peers that are not installed, and why.
        kill_rate: the killed part of the mutants that are not equivalent.
    """

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


@dataclass(frozen=True)
class Check:
    """The verdict on one property, operation and dtype, as conformance.search.Result writes it.

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
        """Of the message."""
        return (self.message or "").partition("\n")[0]

    def again(self, meta: Meta) -> str | None:
        """The command that runs the smallest failing case again."""
        if self.case is None or meta.backend is None or meta.device is None:
            return None
        words = (self.op, *((self.dtype,) if self.dtype else ()), self.property, self.case)
        return repro(" ".join(words), meta.backend, meta.device, meta.source)


@dataclass(frozen=True)
class Mutant:
    """A planted fault and what became of it, as conformance.mutate.report writes it."""

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
        """Whether no property found it, as far as anybody knows."""
        return self.verdict in ("survived", "unreached")

    def again(self, meta: Meta) -> str | None:
        """The command that examines it again."""
        if meta.backend is None or meta.device is None:
            return None
        words = [self.op, "--backend", meta.backend, "--device", meta.device]
        words += ["--profile", meta.profile] if meta.profile else []
        return shlex.join(["python", "-m", "conformance", "mutate", *words, "--mutant", self.mutant])


@dataclass(frozen=True)
class Results:
    """A file of results: those of one kind, the other two empty."""

    name: str
    kind: Kind
    meta: Meta
    checks: tuple[Check, ...] = ()
    rows: tuple[Row, ...] = ()
    mutants: tuple[Mutant, ...] = ()

    @property
    def title(self) -> str:
        """What was done to which backend, and where."""
        what = {"run": "Run of", "coverage": "Coverage of", "mutate": "Mutants of", "bench": "Speed"}[self.kind]
        where = self.meta.gpu or self.meta.device
        return " ".join(filter(None, (what, self.meta.backend, f"on {where}" if where else "")))

    @property
    def ops(self) -> set[str]:
        """The operations and training pieces."""
        return {one.op for one in (*self.checks, *self.rows, *self.mutants)}

    @property
    def ran(self) -> list[Check]:
        """The checks that were not skipped."""
        return [check for check in self.checks if check.verdict != "skip"]

    @property
    def failed(self) -> int:
        """How many checks failed, times mean nothing, mutants survived."""
        checks = sum(check.verdict == "fail" for check in self.checks)
        return checks + sum(row.failed for row in self.rows) + sum(one.survives for one in self.mutants)

    @property
    def stack(self) -> str:
        """The versions, the driver and clock, the profile and the commit, in one line."""
        meta = self.meta
        words = [f"{what} {version}" for what, version in meta.versions.items() if version]
        clock = f"{meta.sm_clock_mhz:.0f} MHz" if meta.sm_clock_mhz else None
        commit = meta.commit and meta.commit[:12]
        others = {"driver": meta.driver, "SM clock": clock, "profile": meta.profile, "commit": commit}
        words += [f"{what} {value}" for what, value in others.items() if value]
        return ", ".join(words)

    @property
    def summary(self) -> str:
        """The counts in one sentence."""
        if self.kind == "bench":
            timed = [row for row in self.rows if row.full is not None]
            wrong = sum(row.red is not None for row in timed)
            return f"{len(timed)} of {len(self.rows)} timed, {wrong} of them with wrong results"
        if self.kind == "mutate":
            judged = [one for one in self.mutants if one.verdict not in ("same bits", "equivalent")]
            return f"{len(judged) - self.failed} of {len(judged)} mutants killed ({percent(self.meta.kill_rate)})"
        ran, skipped = len(self.ran), len(self.checks) - len(self.ran)
        known = sum(check.verdict == "xfail" for check in self.checks)
        ends = [f"{skipped} skipped"] * bool(skipped) + [f"{known} known deviations"] * bool(known)
        return ", ".join([f"{self.failed} of {ran} checks failed", *ends])


KINDS: dict[Kind, tuple[str, str, type]] = {  # the field of a result and the field of meta that only this kind has
    "mutate": ("mutant", "kill_rate", Mutant),
    "bench": ("shape", "copy_bytes_per_second", Row),
    "coverage": ("missed", "missed", Check),
    "run": ("property", "not_defined", Check),
}
ALLOWED = f"allowed: a file that --json of {', '.join(sorted(KINDS))} wrote"
LISTS = {Check: "checks", Row: "rows", Mutant: "mutants"}


def read(path: Path) -> Results:
    """The results of a file.

    Raises:
        FileError: it cannot be read, or is no file of results.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise FileError(f"{path}: it cannot be read: {error.strerror}; {ALLOWED}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: got no JSON ({_one_line(error)}); {ALLOWED}") from error
    meta, results = (found.get("meta"), found.get("results")) if isinstance(found, dict) else (None, None)
    if not isinstance(meta, dict) or not isinstance(results, list):
        raise FileError(f'{path}: got JSON without "meta" and "results"; {ALLOWED}')
    kind = _kind(meta, results)
    if kind is None:
        raise FileError(f"{path}: got {'results of no known kind' if results else 'no results'}; {ALLOWED}")
    kept = KINDS[kind][2]
    try:
        rows = tuple(_made(kept, one, f"result {place}") for place, one in enumerate(results, 1))
        return Results(_text(path.name), kind, _made(Meta, meta, "meta"), **{LISTS[kept]: rows})
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {_one_line(error)}; {ALLOWED}") from error


def _kind(meta: dict[str, Any], results: list[Any]) -> Kind | None:
    """The verb that wrote the file, by a field of its first result, or of meta if it has none."""
    names: Any = meta if not results else results[0] if isinstance(results[0], dict) else ()
    for kind, (of_result, of_meta, _) in KINDS.items():
        if (of_result if results else of_meta) in names:
            return kind
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _text(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _made(cls: type[T], found: Any, where: str) -> T:
    """An object of the dataclass from JSON; keys that it does not have are of a later version and left out."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: got {_shown(found)}, no object")
    hints, values = get_type_hints(cls), {}
    for one in fields(cls):  # type: ignore[arg-type]
        if one.name in found:
            values[one.name] = _value(hints[one.name], found[one.name], f"{where}, {one.name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f'{where}: got no "{one.name}"')
    return cls(**values)


def _value(hint: Any, found: Any, where: str) -> Any:
    """The value if JSON's is of the hinted type, tuples from lists; raises ValueError."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType or (origin is not None and NoneType in inner):
        if found is None:
            return None
        (hint,) = (one for one in inner if one is not NoneType)
        return _value(hint, found, where)
    if origin is tuple and isinstance(found, list):
        hints: Iterable[Any] = inner[:1] * len(found) if Ellipsis in inner else inner
        if Ellipsis in inner or len(inner) == len(found):
            return tuple(_value(one, value, where) for one, value in zip(hints, found, strict=True))
    if origin is dict and isinstance(found, dict):
        return {_text(key): _value(inner[1], value, where) for key, value in found.items()}
    if origin is Literal and found in inner:
        return found
    if hint is float and isinstance(found, (int, float)) and not isinstance(found, bool):
        return _finite(found, where)
    if isinstance(hint, type) and origin is None and type(found) is hint:
        return _text(found) if isinstance(found, str) else found
    raise ValueError(f"{where}: got {_shown(found)}")


def _finite(found: float, where: str) -> float:
    if abs(found) > sys.float_info.max:
        raise ValueError(
            f"{where}: got {found:.5g}" if isinstance(found, float) else f"{where}: got a number too large"
        )
    return float(found)


def _shown(found: Any) -> str:
    text = json.dumps(found)
    return text if len(text) < 60 else f"{text[:56]} ..."


def percent(fraction: float | None) -> str:
    """As "31 %", from ten times on as "12x", and empty without a fraction."""
    return "" if fraction is None else f"{100 * fraction:.3g} %" if fraction < 10 else f"{fraction:.2g}x"


def in_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Without repetitions: the known ones in their order, then the others in theirs."""
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

"""What has each operation reached on this card? A committed file that only gets better, unless a reason is given.

An entry is a passed check with its budget use, the fingerprint of a kernel, or the times of a shape; there is one per
environment. Milliseconds are compared within an environment: the same card, versions and clock. Across environments
only shares of the roofline are, because the copy and the matrix product behind them were measured in the same run.
Fingerprints are compared for one version of Triton.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.bench.measure import NOISE
from conformance.bench.table import KINDS
from conformance.gate import schema, verdict
from conformance.gate.verdict import KEYS, Result
from conformance.reporting import results_file

SCHEMA = 1
# The median of one run can be off by NOISE. Two medians are compared within an environment; across environments each of
# them is divided by the card's measured rate, which is a median too.
TIME_RISE = NOISE**2
SHARE_FALL = NOISE**-4
CLOCK = 0.02  # relative difference of the SM clock within which its state is the same
ENVIRONMENT = ("python", "torch", "triton", "cuda", "driver", "sm_clock_mhz")
FINGERPRINT = ("registers", "stack", "shared", "load", "store", "instructions")

Entry = dict[str, Any]
Environment = Mapping[str, Any]


class LedgerError(Exception):
    """A file that cannot be used as a ledger, or as results for one; the message is one line."""


@dataclass(frozen=True)
class Results:
    """The results of one file, as entries of a ledger.

    Attributes:
        card: the name of the GPU; "cpu" without one.
        entries: what is right, without environment and reason.
        wrong: (kind, key) of what is not right, with what is wrong.
    """

    card: str
    environment: Environment
    entries: list[Entry]
    wrong: dict[tuple[Any, ...], str]


@dataclass
class Ledger:
    """The ledger of one card."""

    card: str
    environments: dict[str, Environment] = field(default_factory=dict)
    entries: dict[tuple[Any, ...], Entry] = field(default_factory=dict)  # by environment, kind, backend and key

    def regressions(self, results: Results) -> list[str]:
        """What is worse than this ledger says, one sentence each."""
        here = self._environment(results.environment)
        found = [s for entry in results.entries for s in self._worse(entry, here, results.environment)]
        recorded = {which[1:] for which in self.entries}
        return found + [
            f"{_about(which[0], which[2:])}: was right in the ledger, and is not now: {why}"
            for which, why in results.wrong.items()
            if which in recorded
        ]

    def operations(self, backend: str) -> set[str]:
        """The operations of a backend of which a check has passed."""
        return {e["op"] for e in self.entries.values() if (e["kind"], e["backend"]) == ("property", backend)}

    def update(self, results: Results, because: str | None = None) -> tuple[int, list[str]]:
        """Record results: better ones always, worse ones only for a reason.

        Returns:
            How many entries changed, and what was refused.
        """
        refused = [] if because else self.regressions(results)
        if refused:
            return 0, refused
        here = self._environment(results.environment)
        if here is None:
            here = f"e{len(self.environments) + 1}"
            self.environments[here] = {name: results.environment[name] for name in ENVIRONMENT}
        before = dict(self.entries)
        for entry in results.entries:
            which = (here, *_key(entry))
            new = {**entry, "environment": here, "because": None}
            old = self.entries.get(which)
            if self._worse(entry, here, results.environment):
                new["because"] = because
            elif old is not None:
                new = _best(old, new)
            self.entries[which] = new
        for which in [which for which in self.entries if which[1:] in results.wrong]:
            del self.entries[which]
        changed = [w for w in {**before, **self.entries} if before.get(w) != self.entries.get(w)]
        return len(changed), []

    def _worse(self, entry: Entry, here: str | None, environment: Environment) -> list[str]:
        which = _key(entry)
        if here is not None and (here, *which) in self.entries:
            return _change(self.entries[here, *which], entry, same=True)
        for name, other in reversed(self.environments.items()):  # the latest first
            old = self.entries.get((name, *which))
            if old is None or (entry["kind"] == "fingerprint" and other["triton"] != environment["triton"]):
                continue
            found = _change(old, entry, same=False)
            if found or old["because"]:  # what was better before was given up
                return found
        return []  # not by a little in each environment either

    def _environment(self, environment: Environment) -> str | None:
        """The name of a recorded environment that is this one."""
        return next((name for name, one in self.environments.items() if _same(one, environment)), None)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        used = {entry["environment"] for entry in self.entries.values()}
        environments = {name: one for name, one in self.environments.items() if name in used}
        meta = {"schema": SCHEMA, "card": self.card, "environments": environments}
        ordered = sorted(self.entries.items(), key=lambda item: tuple(map(str, item[0])))
        results_file.write(path, meta, [entry for _, entry in ordered])


def read(path: Path) -> Ledger:
    """Read a ledger. Raises LedgerError."""
    return parsed(_text(path), path)


def parsed(text: str, path: Path) -> Ledger:
    """The ledger that a text holds; errors name the path. Raises LedgerError."""
    content = _json(text, path)
    found = schema.problem(content, schema.LEDGER, schema.LEDGER)
    if found:
        raise LedgerError(f"{path}: {found}")
    meta = content["meta"]
    ledger = Ledger(meta["card"], dict(meta["environments"]))
    for entry in content["results"]:
        if entry["environment"] not in ledger.environments:
            raise LedgerError(f"{path}: environment: got {entry['environment']!r}; allowed: one of meta.environments")
        which = entry["environment"], *_key(entry)
        if which in ledger.entries:
            raise LedgerError(f"{path}: {_about(which[1], which[3:])}: is recorded twice for {which[0]}; allowed: once")
        ledger.entries[which] = entry
    return ledger


def file_name(card: str) -> str:
    """The name of a card's file: "NVIDIA H200" has nvidia-h200.json."""
    return re.sub(r"[\W_]+", "-", card.lower()).strip("-") + ".json"


def results_in(path: Path) -> Results:
    """What a file of `run`, `bench`, `fingerprint` or `gate` holds for a ledger. Raises LedgerError."""
    content = _json(_text(path), path)
    meta, results = (content.get("meta"), content.get("results")) if isinstance(content, dict) else (None, None)
    later = meta.get("schema", results_file.SCHEMA) if isinstance(meta, dict) else results_file.SCHEMA
    if later != results_file.SCHEMA:
        raise LedgerError(f"{path}: meta.schema: got {later!r}; allowed: {results_file.SCHEMA}")
    if not (isinstance(meta, dict) and isinstance(meta.get("versions"), dict) and isinstance(results, list)):
        raise LedgerError(f"{path}: holds no results; allowed: a file that run, bench, fingerprint or gate wrote")
    try:
        read = results_of(meta, results)
    except KeyError as missing:
        raise LedgerError(f"{path}: a result has no {missing}") from missing
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise LedgerError(f"{path}: a result has another form: {error}") from error
    would_be = [{**entry, "environment": "e1", "because": None} for entry in read.entries]
    content = {"meta": {"schema": SCHEMA, "card": read.card, "environments": {"e1": read.environment}}}
    if wrong := schema.problem({**content, "results": would_be}, schema.LEDGER, schema.LEDGER):
        raise LedgerError(f"{path}: as a ledger, {wrong}")
    for which, count in Counter([*map(_key, read.entries), *read.wrong]).items():
        if count > 1:  # the better one would be lost
            raise LedgerError(f"{path}: {_about(which[0], which[2:])}: got {count} results; allowed: one")
    return read


def results_of(meta: Mapping[str, Any], results: Sequence[Result]) -> Results:
    """The same, of the parts of such a file."""
    environment = {**dict.fromkeys(ENVIRONMENT), **meta["versions"], **meta}
    entries: list[Entry] = []
    wrong: dict[tuple[Any, ...], str] = {}
    for kind, result in _heads(results):
        entry = {"kind": kind, "backend": result.get("backend", meta.get("backend")), **_about_it(kind, result)}
        why = _wrong(kind, result)
        if why is None:
            entries.append({**entry, **_values(kind, result)})
        else:
            wrong[_key(entry)] = why
    kept = {name: environment[name] for name in ENVIRONMENT}
    return Results(meta.get("gpu") or "cpu", kept, entries, wrong)


def _heads(results: Sequence[Result]) -> Iterator[tuple[str, Result]]:
    """Each result with its kind; of a gate the head's."""
    heads = [one.get("head", one) for one in results]
    heads = [one for one in heads if one and ("property" in one or "kernel" in one or "roofline" in one)]
    prints = iter(verdict.numbered([one for one in heads if "kernel" in one]))
    for one in heads:
        if "kernel" in one:
            yield "fingerprint", next(prints)
        elif "roofline" in one:
            yield "time", one
        else:
            yield "property", one


def _about_it(kind: str, result: Result) -> Entry:
    return {name: result[name] for name in KEYS[kind]}


def _wrong(kind: str, result: Result) -> str | None:
    """What is not right about a result, in one line; None if it is right."""
    if kind == "property":
        why = None if result["verdict"] == "pass" else result["message"] or result["verdict"]
    elif kind == "fingerprint":
        why = result["problem"]
    else:
        why = result["wrong"] or ("not timed" if result["full"] is None else None)
    return None if why is None else str(why).partition("\n")[0]


def _values(kind: str, result: Result) -> Entry:
    if kind == "property":
        return {"budget_use": result["budget_use"]}
    if kind == "fingerprint":
        return {name: result[name] for name in FINGERPRINT if name in result}  # older files count no instructions
    medians = {name: result[name][1] for name in KINDS if result[name] is not None}
    shares = {name: share for name, share in result["roofline"].items() if name in medians and share > 0}
    return {"milliseconds": medians, "roofline": shares} | {
        name: result[name] for name in ("peak_mebibytes", "error_use")
    }


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry["kind"], entry["backend"], *verdict.key(entry["kind"], entry)


def _about(kind: str, key: Sequence[Any]) -> str:
    return verdict.name(kind, dict(zip(KEYS[kind], key, strict=True)))


def _change(old: Entry, new: Entry, same: bool) -> list[str]:
    """What is worse in a new entry; `same` if both are of one environment."""
    kind = old["kind"]
    if kind == "property":
        return verdict.property_change({**old, "verdict": "pass"}, {**new, "verdict": "pass"})[0]
    if kind == "fingerprint":
        return verdict.fingerprint_change({**old, "problem": None}, {**new, "problem": None})[0]
    about = verdict.name("time", new)
    found = list(_slower(about, old, new)) if same else list(_lower(about, old, new))
    memory = old["peak_mebibytes"], new["peak_mebibytes"]
    if same and None not in memory and memory[1] > (allowed := verdict.memory_allowed(memory[0])):
        found.append(f"{about}: peak memory: got {memory[1]:.1f} MiB; allowed: {allowed:.1f}")
    return found


def _slower(about: str, old: Entry, new: Entry) -> Iterator[str]:
    for kind, before in old["milliseconds"].items():
        now, allowed = new["milliseconds"].get(kind), before * TIME_RISE
        if now is None:
            yield f"{about}: {kind}: was timed in the ledger, and is not now"
        elif now > allowed:
            yield f"{about}: {kind}: got {now:.4f} ms; allowed: {allowed:.4f} (the ledger {before:.4f})"


def _lower(about: str, old: Entry, new: Entry) -> Iterator[str]:
    for kind, before in old["roofline"].items():
        now, allowed = new["roofline"].get(kind), before * SHARE_FALL
        if now is not None and now < allowed:
            share = f"{100 * allowed:.0f} % (the ledger, with other versions or clock, {100 * before:.0f} %)"
            yield f"{about}: {kind}: got {100 * now:.0f} % of the roofline; allowed: {share}"


def _best(old: Entry, new: Entry) -> Entry:
    """The better of two entries of one environment, value by value."""
    kind = old["kind"]
    if kind == "property":
        return {**new, "because": old["because"]} if _less(new["budget_use"], old["budget_use"]) else old
    if kind == "fingerprint":
        better = all(new[name] <= old.get(name, new[name]) for name in ("registers", "stack", "shared", "instructions"))
        better &= all(new[name] >= old[name] for name in ("load", "store"))
        return {**new, "because": old["because"]} if better else old
    found = {**old, "milliseconds": dict(old["milliseconds"]), "roofline": dict(old["roofline"])}
    for name, now in new["milliseconds"].items():
        if _less(now, old["milliseconds"].get(name)):
            found["milliseconds"][name] = now
        if new["roofline"].get(name, 0) > old["roofline"].get(name, 0):
            found["roofline"][name] = new["roofline"][name]
    for name in ("peak_mebibytes", "error_use"):
        if _less(new[name], old[name]):
            found[name] = new[name]
    return found


def _less(new: float | None, old: float | None) -> bool:
    return new is not None and (old is None or new < old)


def _same(one: Environment, other: Environment) -> bool:
    clock, other_clock = (environment["sm_clock_mhz"] or 0 for environment in (one, other))
    close = abs(clock - other_clock) <= CLOCK * max(clock, other_clock)
    return close and all(one[name] == other[name] for name in ENVIRONMENT[:-1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LedgerError(f"{path}: no JSON: {error}") from error


def _json(text: str, path: Path) -> Any:
    try:
        return results_file.parsed(text)
    except ValueError as error:
        raise LedgerError(f"{path}: no JSON: {error}") from error

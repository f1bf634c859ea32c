"""Known deviations of a backend: failures that are expected, each with its reason.

A file of them is TOML:

    [[deviation]]
    operation = "rms_norm"
    property = "inputs_untouched"      # "*": any; for a failure that random cases show under different properties
    # Both may be a list of names. Each of its properties must then fail in each of its operations.
    reason = "the backward pass writes over grad_output"
    dtype = "bfloat16"                 # optional: all dtypes by default
    device = "cuda"                    # optional: all devices by default
    message = "grad_output"            # optional: a text that the message of the failure contains

`conformance/peers/NAME.toml` holds those of a peer of the project. An expected failure has the verdict "xfail" and does
not fail a run. A deviation that no longer shows, in any of its dtypes that ran, fails it: the file is out of date. This
is not decided if every run draws other random cases, nor for "*" if only some of the properties ran.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conformance import peers
from conformance.case import DTYPES
from conformance.declarations import SpecError
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.running.search import Result

NEEDED = ("operation", "property", "reason")
KEYS = (*NEEDED, "dtype", "device", "message")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Deviation:
    """One known deviation.

    Attributes:
        operation, property: that fail; "*" for any property.
        reason: why, for the reader of a report.
        dtype, device: in which and where it fails; None for all.
        message: what the message of the failure contains.
    """

    operation: str
    property: str
    reason: str
    dtype: str | None = None
    device: str | None = None
    message: str = ""

    def covers(self, result: Result) -> bool:
        """Whether a result is that of this operation, property and dtype, and fails in this way if it fails."""
        same = result.op == self.operation and self.property in ("*", result.property)
        return same and self.dtype in (None, result.dtype) and (not result.message or self.message in result.message)


def shipped(backend: str) -> Path | None:
    """The file of a peer's deviations, if it has one."""
    path = Path(peers.__file__).with_name(f"{backend}.toml")
    return path if backend in peers.PACKAGES and path.is_file() else None


def read(path: Path, device: str) -> list[Deviation]:
    """The deviations of a file on a device.

    Raises:
        SpecError: it cannot be read, or an entry lacks a key or has another.
    """
    try:
        file = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"--deviations: got {path}, which cannot be read: {error}") from error
    entries = file.get("deviation", [])
    if file.keys() - {"deviation"} or not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise SpecError(f"{path}: got {', '.join(file)}; allowed: entries that begin with [[deviation]]")
    found = []
    for entry in entries:
        wrong = [key for key in entry if key not in KEYS] + [key for key in NEEDED if key not in entry]
        ops, properties = (_names(entry.get(key)) for key in ("operation", "property"))
        texts = [*ops, *properties, *(value for key, value in entry.items() if key not in ("operation", "property"))]
        if wrong or not ops or not properties or not all(isinstance(text, str) for text in texts):
            raise SpecError(
                f"{path}: got an entry with {', '.join(entry)}; allowed: {', '.join(KEYS)}, each a text, and for "
                "operation and property also a list of texts"
            )
        for key, allowed in (("dtype", DTYPES), ("device", DEVICES)):
            if entry.get(key) not in (None, *allowed):
                raise SpecError(f"{path}: {key}: got {entry[key]!r}; allowed: {', '.join(allowed)}")
        found += [Deviation(**entry | {"operation": op, "property": name}) for op in ops for name in properties]
    return [one for one in found if one.device in (None, device)]


def _names(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def expected(result: Result, known: Sequence[Deviation]) -> Result:
    """The result; a failure that is known as an expected failure."""
    deviation = next((one for one in known if one.covers(result)), None)
    if deviation is None or result.verdict != "fail":
        return result
    return replace(result, verdict="xfail", message=f"expected: {deviation.reason}\n{result.message}")


def gone(results: Sequence[Result], known: Sequence[Deviation], profile: str) -> list[Result]:
    """The results under a profile; those that pass although a known deviation does not show have become failures."""
    same = PROFILES[profile].derandomize

    def decisive(one: Deviation) -> bool:
        """Whether these results would show it."""
        if one.property == "*":
            return same and {r.property for r in results if r.op == one.operation} >= set(PROPERTIES)
        return same or (one.property in PROPERTIES and PROPERTIES[one.property].cases is not None)

    shown = [one for one in known if any(one.covers(result) for result in results if result.verdict == "xfail")]
    changed = []
    for result in results:
        dead = next((one for one in known if one.covers(result) and one not in shown and decisive(one)), None)
        if dead is not None and result.verdict == "pass":
            why = f"passes, but is declared as a deviation: {dead.reason}"
            result = replace(result, verdict="fail", budget_use=None, message=why)
        changed.append(result)
    return changed

"""Mutants that were read and confirmed to be correct: `equivalent.toml` names them, with the reason."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.mutate.mutant import Mutant

FILE = Path(__file__).with_name("equivalent.toml")


@dataclass(frozen=True)
class Equivalent:
    """A change that leaves a kernel correct.

    Attributes:
        file: the end of the path of the changed file.
        function: the function that contains the change; "" outside of functions.
        old: the changed lines, without indentation.
        new: the same lines after the change; several entries that differ in nothing else list them together.
        reason: why no user can tell the difference.
        confirmed: who read it.
        device: "cpu" or "cuda" if this holds there alone; None for every device.
    """

    file: str
    function: str
    old: str
    new: tuple[str, ...]
    reason: str
    confirmed: str
    device: str | None = None

    def matches(self, mutant: Mutant) -> bool:
        """Whether the mutant is this change."""
        old, new = mutant.change
        where = Path(mutant.source.label).as_posix().endswith(self.file) and mutant.function == self.function
        return where and old == self.old and new in self.new


def confirmed(device: str | None = None) -> list[Equivalent]:
    """The entries of the file; those that hold on a device, if one is given."""
    entries = tomllib.loads(FILE.read_text(encoding="utf-8")).get("equivalent", [])
    found = [
        Equivalent(
            file=entry["file"],
            function=entry["function"],
            old=entry["old"],
            new=(entry["new"],) if isinstance(entry["new"], str) else tuple(entry["new"]),
            reason=entry["reason"],
            confirmed=entry["confirmed"],
            device=entry.get("device"),
        )
        for entry in entries
    ]
    return [entry for entry in found if device is None or entry.device in (None, device)]


def stale(entries: Sequence[Equivalent], mutants: Sequence[Mutant]) -> list[Equivalent]:
    """The entries with a change that none of the mutants makes."""
    changes = {(Path(m.source.label).name, m.function, *m.change) for m in mutants}
    return [e for e in entries if any((Path(e.file).name, e.function, e.old, new) not in changes for new in e.new)]

"""A mutant: one small fault in one source file, with a stable name and a readable diff."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

Replacement = tuple[int, int, str]  # first byte, byte after the last, new text
Region = tuple[int, int, int, int]  # first line, column, last line, column; lines from 1, columns in bytes from 0


@dataclass(frozen=True)
class SourceFile:
    """A source file of an operation.

    Attributes:
        module: its name in `sys.modules`.
        path: of the file.
        label: the path for messages, relative to the current folder if it is inside.
        text: its content.
        names: the top-level names that the operation uses; None for all.
    """

    module: str
    path: Path
    label: str
    text: str
    names: frozenset[str] | None = None


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        source: the file that is changed.
        kind: the kind of fault.
        line: where the changed expression begins.
        index: counts the mutants of this kind in this line, from 0.
        function: the function that contains it; "" outside of functions.
        edits: what is replaced; they do not overlap.
        region: the expression that must run for the fault to have an effect; None if importing the file runs it.
        choice: whether it changes a launch parameter, which a correct kernel may choose freely.
    """

    source: SourceFile
    kind: str
    line: int
    index: int
    function: str
    edits: tuple[Replacement, ...]
    region: Region | None
    choice: bool = False

    @property
    def name(self) -> str:
        """FILE:LINE:KIND:INDEX."""
        return f"{self.source.label}:{self.line}:{self.kind}:{self.index}"

    @property
    def text(self) -> str:
        """The changed file."""
        text = self.source.text.encode()
        for begin, end, new in sorted(self.edits, reverse=True):
            text = text[:begin] + new.encode() + text[end:]
        return text.decode()

    @property
    def change(self) -> tuple[str, str]:
        """The lines that differ, before and after, without indentation."""
        text = self.source.text.encode()
        begin = text.rfind(b"\n", 0, min(first for first, _, _ in self.edits)) + 1
        end = text.find(b"\n", max(last for _, last, _ in self.edits)) % (len(text) + 1)
        longer = len(self.text.encode()) - len(text)
        old, new = text[begin:end], self.text.encode()[begin : end + longer]
        return _unindented(old.decode()), _unindented(new.decode())

    @property
    def diff(self) -> str:
        """A unified diff with two lines of context, without the heading."""
        lines = difflib.unified_diff(self.source.text.splitlines(), self.text.splitlines(), n=2, lineterm="")
        return "\n".join(list(lines)[2:])


def edit(op: str, name: str, kind: str, diff: str) -> tuple[str, ...]:
    """The identity of a mutant without its line: it is the same for the same fault in another revision."""
    return op, kind, name.partition(":")[0], re.sub(r"^@@.*$", "", diff, flags=re.MULTILINE)


def _unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())

"""The results as the comment of a pull request: what changed against a base, and the failures with their commands.

Names and messages stand in code spans and fences, so that nothing in them is markup or mentions a person.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conformance.page.compare import FACTOR, WORDS, Change, changes
from conformance.page.model import Check, Mutant, Results, failures, percent, verdict

LIMIT = 65_000  # characters; GitHub takes 65 536 in a comment, and the action adds a line
RESERVE = 300  # for the line that says what was left out of a section, and its markup
LINE = 300  # characters of a name or the first line of a message
MESSAGE = 1500  # characters of a message or diff that are shown


@dataclass(frozen=True)
class Section:
    """A part of the comment that may be cut between two items."""

    title: str
    items: Sequence[str]
    head: str = ""
    folded: bool = False


def comment(files: Sequence[Results], base: Sequence[Results] | None = None, factor: float = FACTOR) -> str:
    """The comment, below GitHub's limit; it states how many items are left out."""
    words, good = verdict(files)
    sign = {True: "✅", None: "⚠️", False: "❌"}[good]
    text = f"## Conformance: {sign} {words}"
    found = changes(files, base, factor)
    if base is not None or any(file.kind == "gate" for file in files):
        counts = [(word, sum(change.word == word for change in found)) for word in WORDS]
        text += "\n\nAgainst the base: " + ", ".join(f"{count} {word}" for word, count in counts) + "."
    sections = [section for section in _sections(files, found) if section.items]
    for place, section in enumerate(sections):
        text += _cut(section, LIMIT - len(text) - RESERVE * (len(sections) - place))
    return f"{text}\n"


def _sections(files: Sequence[Results], found: Sequence[Change]) -> list[Section]:
    """The sections, those that need attention first."""
    by_word = {word: [_change(change) for change in found if change.word == word] for word in WORDS}
    failed = [_failure(checks, file) for file in files for checks in failures(file.checks).values()]
    bad = [
        f"- {code(f'{r.op} {r.shape} {r.backend}')}: {code(r.wrong or '')}" for f in files for r in f.rows if r.failed
    ]
    missed = [_survivor(one, file) for file in files for one in file.mutants if one.survives]
    head = table(("operation, shape, backend", "call ms", "device ms", "roofline", "budget use"), ())
    others = [f"- {code(one.name())}" for file in files for one in file.compared if one.verdict == "wrong"]
    notes = [f"- {code(note)}" for file in files for note in file.meta.notes]
    stacks = [f"- {code(file.name)}: {code(file.stack)}" for file in files]
    results = [f"| {_cell(file.title)} | {file.summary} | {_cell(file.name)} |" for file in files]
    return [
        Section("Results", results, table(("results", "verdict", "file"), ())),
        Section("Regressed", by_word["regressed"]),
        Section("Failures", failed),
        Section("Times without meaning", bad),
        Section("Mutants that survived", missed),
        *(Section(word.capitalize(), by_word[word], folded=word != "improved") for word in WORDS[1:]),
        Section("Other failures", others, folded=True),
        Section("Notes", notes, folded=True),
        Section("Speed", _speed(files), head, folded=True),
        Section("Measured with", stacks, folded=True),
    ]


def _cut(section: Section, room: int) -> str:
    """The section with as many items as there is room for."""
    begin, end = f"\n\n### {section.title} ({len(section.items)})\n", ""
    if section.folded:
        begin, end = f"\n\n<details><summary>{section.title} ({len(section.items)})</summary>\n", "\n\n</details>"
    begin += f"\n{section.head}" * bool(section.head)
    kept: list[str] = []
    for item in section.items:
        if len(begin) + len(item) + 1 > room:
            break
        room -= len(item) + 1
        kept.append(item)
    left = len(section.items) - len(kept)
    more = f"\n\nand {left} more, which the page and the files of results list" * bool(left)
    return "\n".join([begin, *kept]) + more + end


def _change(change: Change) -> str:
    """What changed, and the command that reproduces it."""
    lines = [f"- {code(change.name)}: {code(change.text)}"]
    block = "\n".join(_fenced(change.again, "sh")) if change.again else ""
    return "\n".join(lines + [f"  {line}" for line in block.splitlines()])


def _failure(checks: Sequence[Check], file: Results) -> str:
    """The failures of a property in several dtypes."""
    first = checks[0]
    dtypes = ", ".join(check.dtype for check in checks if check.dtype)
    lines = [f"**{code(f'{first.op} / {first.property}')}** {code(dtypes)}, {code(file.title)}"]
    for check in checks:
        again = check.again(file.meta)
        lines += ["", *_fenced(_clipped(check.message or "failed"), "text")]
        lines += _fenced(again, "sh") if again else []
    return "\n".join([*lines, ""])


def _survivor(one: Mutant, file: Results) -> str:
    title = f"**{code(f'{one.op} {one.mutant}')}** {one.verdict}"
    again = one.again(file.meta)
    lines = [title, "", *_fenced(_clipped(one.diff), "diff"), *(_fenced(again, "sh") if again else ()), ""]
    return "\n".join(lines)


def _speed(files: Sequence[Results]) -> list[str]:
    rows = []
    for row in (row for file in files for row in file.rows):
        name = _cell(f"{row.op} {row.shape} {row.dtype}, {row.backend}")
        device = f"{row.device_full[1]:.3f}" if row.device_full else ""
        call = f"{row.full[1]:.3f}" if row.full else "not timed"
        share = percent(row.roofline.get("full"))
        rows.append(
            f"| {name} | {call} | {device} | {share} | {_cell(row.wrong) if row.wrong else percent(row.error_use)} |"
        )
    return rows


def _clipped(text: str) -> str:
    return text if len(text) <= MESSAGE else f"{text[:MESSAGE]}\n... {len(text) - MESSAGE} characters more"


def _fenced(text: str, language: str) -> list[str]:
    fence = _ticks(text, 3)
    return [f"{fence}{language}", text, fence]


def _ticks(text: str, least: int) -> str:
    """A run of backticks that is longer than any in the text."""
    return "`" * max([least, *(1 + len(run) for run in re.findall("`+", text))])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are Markdown."""
    head, *lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (heads, *rows)]
    return "\n".join([head, "|---" * len(heads) + "|", *lines])


def code(text: str) -> str:
    """A code span of one line, clipped."""
    line = " ".join(text.split())
    line = line if len(line) <= LINE else f"{line[: LINE - 4]} ..."
    ticks = _ticks(line, 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}" if line else ""


def _cell(text: str) -> str:
    """A code span in a table, where a bar ends the cell even in code."""
    return code(text).replace("|", "\\|")

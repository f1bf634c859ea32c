"""The results as one HTML page that needs no network: it has no script, and its policy lets it load nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conformance.gate.history import Point
from conformance.page import checks, gate, history, mutants, speed
from conformance.page.compare import FACTOR, WORDS, Change, changes
from conformance.page.markup import Markup, table, tag
from conformance.page.model import Results, verdict

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SIGNS = {"regressed": "✗", "skipped": "-", "unsure": "?", "new": "+", "improved": "✓"}


def page(
    files: Sequence[Results],
    base: Sequence[Results] | None = None,
    ledgers: Sequence[Point] = (),
    factor: float = FACTOR,
) -> str:
    """The page: a summary, what changed against the base, a part per file, then the history of a ledger."""
    style = Markup(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    title = f"Conformance: {verdict(files)[0]}" if files else "Conformance: history"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    parts = [(f"part-{place}", file) for place, file in enumerate(files, 1)]
    top = tag(
        "header",
        tag("h1", "Conformance ", _verdict(files) if files else None),
        _summary(parts) if parts else None,
    )
    sections = [tag("section", tag("h2", file.title), *_part(file), id=name) for name, file in parts]
    if ledgers:
        sections.append(tag("section", tag("h2", "History"), *history.part(ledgers), id="history"))
    main = tag("main", top, _changes(files, base, factor), *sections)
    return f"<!doctype html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def _verdict(files: Sequence[Results]) -> Markup:
    words, good = verdict(files)
    sign, style = {True: ("✓", "ok"), None: ("-", "known"), False: ("✗", "bad")}[good]
    return tag("span", f"{sign} {words}", class_=style)


def _summary(parts: Sequence[tuple[str, Results]]) -> Markup:
    rows = [
        (
            tag("a", file.title, href=f"#{name}"),
            tag("td", file.summary, class_="bad" if file.failed else None),
            file.name,
            tag("td", file.stack, class_="small"),
        )
        for name, file in parts
    ]
    return table(("results", "verdict", "file", "measured with"), rows, caption="Summary", wide=True)


def _part(file: Results) -> list[Markup]:
    if file.kind == "bench":
        return speed.part(file)
    if file.kind == "gate":
        return gate.part(file)
    if file.kind == "mutate":
        return mutants.part(file)
    return checks.part(file)


def _changes(files: Sequence[Results], base: Sequence[Results] | None, factor: float) -> Markup | None:
    found = changes(files, base, factor)
    if base is None and not any(file.kind == "gate" for file in files):
        return None
    rows = [(f"{SIGNS[change.word]} {change.word}", change.name, _how(change)) for change in found]
    counts = ", ".join(f"{sum(change.word == word for change in found)} {word}" for word in WORDS)
    shown = table(("", "what", "how"), rows, caption="Changes against the base", wide=True) if rows else None
    return tag("section", tag("h2", "Against the base"), tag("p", counts, "."), shown, id="changes")


def _how(change: Change) -> Markup:
    """What happened, and the command that reproduces it."""
    return tag("td", change.text, tag("pre", change.again, class_="command") if change.again else None)

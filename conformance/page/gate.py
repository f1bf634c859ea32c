"""The part of the page about a gate: how much faster or slower each shape is. Its regressions are above all parts."""

from __future__ import annotations

from collections import Counter

from conformance.page.markup import Markup, table, tag
from conformance.page.model import Results

STYLES = {"FASTER": "ok", "SLOWER": "bad", "UNSURE": "known"}


def part(file: Results) -> list[Markup]:
    """The counts by verdict, the times, the notes."""
    counts = Counter((one.kind, one.verdict or "no speed") for one in file.compared)
    rows = [(kind, verdict, count) for (kind, verdict), count in sorted(counts.items())]
    found = [table(("what", "verdict", "count"), rows, caption="Compared with the base", class_="figures")]
    timed = [one for one in file.compared if one.kind == "time"]
    kinds = list(dict.fromkeys(kind for one in timed for kind in one.times))
    times = [
        (
            one.name(),
            tag("td", one.verdict or one.no_speed or "no speed", class_=STYLES.get(one.verdict or "")),
            *(one.times[kind].shown() if kind in one.times else "-" for kind in kinds),
        )
        for one in timed
    ]
    caption = "Times of the head divided by those of the base, with their intervals"
    if times:
        found.append(table(("shape", "verdict", *kinds), times, caption=caption, wide=True, class_="figures times"))
    return found + [tag("p", f"Note: {note}") for note in file.meta.notes]

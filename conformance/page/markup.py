"""How is HTML written so that everything from a file is escaped? A text is escaped unless `tag` made it."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = ("meta", "br", "wbr")  # have no end tag; elements of SVG have


class Markup(str):
    """HTML, made by `tag` and `join`."""


Child = str | int | None


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """An element: texts are escaped, None is left out; `class_` and `aria_label` stand for class and aria-label."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in VOID else f"</{name}>"
    return Markup(f"<{name}{words}>{join(children)}{end}")


def join(children: Iterable[Child]) -> Markup:
    """Concatenate the parts."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def _escaped(child: Child) -> str:
    return child if isinstance(child, Markup) else html.escape(str(child))


def breakable(name: str) -> Markup:
    """A name that may be broken after an underscore or a dot."""
    parts = name.replace("_", "_\0").replace(".", ".\0").split("\0")
    return join(child for place, part in enumerate(parts) for child in ((tag("wbr"),) * bool(place) + (part,)))


def table(
    heads: Iterable[Child], rows: Iterable[Iterable[Child]], *, caption: str, wide: bool = False, **attributes: str
) -> Markup:
    """A table whose first column heads its rows; one that may be wider than the page is scrolled."""
    found = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))),
        tag("tbody", *(row(cells) for cells in rows)),
        **attributes,
    )
    return scrolled(found, caption) if wide else found


def row(cells: Iterable[Child]) -> Markup:
    """A row of a table; a cell that is a `td` already stays."""
    first, *others = cells
    made = (one if isinstance(one, Markup) and one.startswith("<td") else tag("td", one) for one in others)
    return tag("tr", tag("th", first, scope="row"), *made)


def scrolled(content: Markup, label: str) -> Markup:
    """A region that scrolls sideways, with the keyboard as well."""
    return tag("div", content, class_="wide", tabindex=0, role="region", aria_label=label)

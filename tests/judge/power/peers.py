"""The part of docs/judge-power.md about other people's kernels: each finding, with the command that reproduces it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from conformance.page.markdown import table
from conformance.reporting.report import repro

Json = Mapping[str, Any]

INTRODUCTION = """
## Other people's kernels

What the judge reports of other libraries, each called as its users call it. A property states this project's contract.
Where a library promises something else (it writes over its inputs to save memory, lacks an option, gives no gradient to
a norm's weight), a finding is a difference, not a defect. Differences that are known are listed with their reason.

A check is one property of one operation in one dtype. The list joins the checks that show the same; the command below
an item runs the smallest case of the first of them again, in an environment that has the library. Checks of which the
library refuses every case are not counted.
"""


def section(peers: Mapping[str, Json]) -> list[str]:
    """The paragraphs; none without peers."""
    if not peers:
        return []
    heads = ("library", "judged on", "operations", "checks", "of these fail", "fail as known")
    summary = table(heads, (_summary(name, peer) for name, peer in peers.items()))
    return [INTRODUCTION, summary, *(part for name, peer in peers.items() for part in _peer(name, peer))]


def _title(name: str, peer: Json) -> str:
    """The backend, with the name of its file if that says more."""
    backend = peer["meta"]["backend"]
    return backend if name == backend else f"{backend} ({name})"


def _of(peer: Json, verdict: str) -> list[Json]:
    return [result for result in peer["results"] if result["verdict"] == verdict]


def _summary(name: str, peer: Json) -> tuple[str, ...]:
    meta = peer["meta"]
    judged = [result for result in peer["results"] if result["verdict"] != "skip"]
    ops = len({result["op"] for result in judged})
    numbers = [len(judged), len(_of(peer, "fail")), len(_of(peer, "xfail"))]
    device = f"{meta.get('gpu') or meta['device']}, profile `{meta['profile']}`"
    return _title(name, peer), device, str(ops), *map(str, numbers)


def _peer(name: str, peer: Json) -> list[str]:
    """A heading, then what each operation shows: findings first, then what is known."""
    meta = peer["meta"]
    versions = ", ".join(f"{package} {version}" for package, version in meta["versions"].items() if version)
    parts = [f"### {_title(name, peer)}", f"{versions}."]
    judged = {result["op"]: None for result in peer["results"] if result["verdict"] != "skip"}
    shows = {result["op"] for result in (*_of(peer, "fail"), *_of(peer, "xfail"))}
    if clean := [op for op in judged if op not in shows]:
        parts.append(f"Every check passes: {', '.join(clean)}.")
    for op in (op for op in judged if op in shows):
        parts.append(f"#### {op}")
        parts += [_finding(meta, group) for verdict in ("fail", "xfail") for group in _groups(peer, op, verdict)]
    return parts


def _groups(peer: Json, op: str, verdict: str) -> list[list[Json]]:
    """The results that show the same: those with the same reason, or with messages that differ in numbers alone."""
    groups: dict[str, list[Json]] = {}
    for result in _of(peer, verdict):
        if result["op"] == op:
            groups.setdefault(_kind(_lines(result)[0]), []).append(result)
    return list(groups.values())


def _kind(line: str) -> str:
    """A message without what differs from case to case: where it was seen, dtypes, numbers."""
    line = re.sub(r"torch\.b?float\d+", "a dtype", line)
    line = re.sub(r"^(first|in a repeated call|[\w=() ]+ (contiguous|expanded|offset|halves|transposed)): ", "", line)
    return re.sub(r"\([\d, ]*\)|-?\d[\d.e+-]*", "N", line)


def _lines(result: Json) -> list[str]:
    return (result["message"] or "no message").split("\n")


def _finding(meta: Json, group: Sequence[Json]) -> str:
    """An item of a list: properties, dtypes, what was seen, why it is expected, and a command."""
    first = group[0]
    lines = _lines(first)
    known = first["verdict"] == "xfail"
    reason = lines.pop(0).removeprefix("expected: ") if known else ""
    properties = ", ".join(dict.fromkeys(f"`{result['property']}`" for result in group))
    dtypes = ", ".join(dict.fromkeys(result["dtype"] for result in group if result["dtype"]))
    seen = escaped("; ".join(line.strip() for line in lines[:2]))
    item = f"- {properties} ({dtypes})" if dtypes else f"- {properties}"
    item += f", known: {escaped(reason)}. Seen first: {seen}" if known else f": {seen}"
    return "\n".join([item, "", "  ```sh", f"  {_command(meta, first)}", "  ```"])


def _command(meta: Json, result: Json) -> str:
    """The command that reproduces a finding: it runs the case, or the whole property if there is none."""
    backend, device = meta["backend"], meta["device"]
    if not result["case"]:
        words = f"{result['op']} --backend {backend} --device {device} --property {result['property']}"
        return f"python -m conformance run {words}"
    words = [result["op"], *([result["dtype"]] if result["dtype"] else []), result["property"], result["case"]]
    return repro(" ".join(words), backend, device, meta.get("source", ()))


def escaped(text: str) -> str:
    """The text with Markdown's special characters escaped."""
    return re.sub(r"([*<>`\[\]|])", r"\\\1", text)

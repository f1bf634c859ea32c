"""The results as JUnit's XML, which CI systems read: a test suite per operation, a test case per property and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from conformance.page.model import Check, Meta, Results


def junit(files: Sequence[Results]) -> str:
    """The XML: <testsuites>, in it one <testsuite> per file and operation.

    A known deviation counts as skipped, as pytest writes it. A time is a failure if it means nothing, a mutant if it
    survives.
    """
    root = Element("testsuites", name="conformance")
    for file in files:
        suites: dict[str, Element] = {}
        for op, case in _cases(file):
            if op not in suites:
                suites[op] = ElementTree.SubElement(root, "testsuite", name=f"{file.title}: {op}")
            suites[op].append(case)
    for suite in root:
        counts = {"tests": len(suite), "failures": len(suite.findall("*/failure")), "errors": 0}
        for key, count in {**counts, "skipped": len(suite.findall("*/skipped"))}.items():
            suite.set(key, str(count))
    for key in ("tests", "failures"):
        root.set(key, str(sum(int(suite.get(key, 0)) for suite in root)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False).join(
        ('<?xml version="1.0" encoding="UTF-8"?>\n', "\n")
    )


def _cases(file: Results) -> Iterable[tuple[str, Element]]:
    """Each test case with its operation."""
    backend = file.meta.backend or file.kind
    for check in file.checks:
        name = f"{check.property}[{check.dtype}]" if check.dtype else check.property
        yield check.op, _check(check, _case(backend, check.op, name), file.meta)
    for row in file.rows:
        case = _case(backend, row.op, f"{row.shape}[{row.dtype}-{row.backend}]")
        if row.failed:
            _add(case, "failure", row.wrong or row.remark or "failed", "")
        elif row.full is None:
            _add(case, "skipped", f"not timed: {row.wrong}", "")
        yield row.op, case
    for mutant in file.mutants:
        case = _case(backend, mutant.op, mutant.mutant)
        if mutant.survives:
            _add(case, "failure", mutant.verdict, mutant.diff)
        elif mutant.verdict in ("same bits", "equivalent"):
            _add(case, "skipped", mutant.reason or mutant.verdict, "")
        yield mutant.op, case
    for one in file.compared:
        case = _case(backend, one.op, f"{one.kind}: {one.name()}")
        if one.regressions:
            text = _with_command("\n".join(one.regressions), one.again(file.meta))
            _add(case, "failure", one.regressions[0], text)
        elif one.verdict == "wrong":
            _add(case, "skipped", "fails, and is no regression", "")
        elif one.no_speed:
            _add(case, "skipped", one.no_speed, "")
        yield one.op, case


def _case(backend: str, op: str, name: str) -> Element:
    return Element("testcase", classname=f"{backend}.{op}", name=name)


def _check(check: Check, case: Element, meta: Meta) -> Element:
    if check.verdict == "fail":
        _add(case, "failure", check.first_line(), _with_command(check.message, check.again(meta)))
    elif check.verdict in ("skip", "xfail"):
        _add(case, "skipped", check.first_line() or "no reason given", "")
    return case


def _with_command(message: str | None, again: str | None) -> str:
    return "\n".join(filter(None, (message, again and f"reproduce: {again}")))


def _add(case: Element, kind: str, message: str, text: str) -> None:
    ElementTree.SubElement(case, kind, message=message).text = text or None

"""The checks of a pytest run: collects them, runs each in a worker process, and reports as `conformance run` does.

The worker process lasts from check to check. A kernel that ends it fails its check, not the test run, and what a
backend's import changes, such as TRITON_INTERPRET, does not reach the tests of the repository.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from conformance.declarations import SpecError
from conformance.pytest_plugin import NODE
from conformance.reporting import deviations, report
from conformance.reporting.deviations import Deviation
from conformance.running.catalogue import UsageError, ask
from conformance.running.runner import OneByOne, Task, alone
from conformance.running.search import Result

NAME = re.compile(rf"{NODE}::(?P<op>\w+)\[((?P<dtype>\w+)-)?(?P<property>\w+)\]")


class CheckFailed(AssertionError):
    """A property does not hold; the message is that of `conformance run`."""


class Check(pytest.Item):
    """One property of one operation in one dtype, or of one training piece."""

    def __init__(
        self, *, task: Task, check: Callable[[Task], Result], known: Sequence[Deviation], **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._task, self._check, self._known = task, check, known
        self.user_properties.append(("device", task.device))
        self.add_marker(NODE)

    def runtest(self) -> None:
        """Run the check in the worker process.

        Raises:
            CheckFailed: the property does not hold, and no known deviation says so.
        """
        with alone(self._task.property):
            result = self._check(self._task)
        if result.budget_use is not None:
            self.user_properties.append(("budget_use", result.budget_use))
        result = deviations.expected(result, self._known)
        if result.verdict == "skip":
            pytest.skip(result.message or "")
        if result.verdict == "xfail":
            pytest.xfail(result.message or "")
        if result.verdict == "fail":
            raise CheckFailed(f"{self._paragraph(result)}\n  in pytest:     {self._again()}")

    def _paragraph(self, result: Result) -> str:
        return report.failures([result], self._task.backend, self._task.device, self._task.source)

    def _again(self) -> str:
        """The command that runs this check alone, with its whole search."""
        option: Any = self.config.option
        about = ("backend", self._task.backend), ("device", self._task.device), ("profile", option.conformance_profile)
        words = [word for name, value in about for word in (f"--conformance-{name}", value)]
        return shlex.join(["pytest", *words, self.nodeid])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The message of a failed check, without a traceback, which would only show the judge."""
        if isinstance(excinfo.value, CheckFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """The name, in place of a line of a file."""
        return self.path, None, self.name


class Backend(pytest.Collector):
    """The backend that the options ask for: the parent of its checks."""

    def __init__(self, *, asked: Sequence[str], **settings: Any) -> None:
        super().__init__(**settings)
        self._asked = asked

    def collect(self) -> list[Check]:
        """One check for each operation, dtype and property, or those whose ids are asked for.

        Raises:
            pytest.Collector.CollectError: the backend, the device, the profile or the file of deviations is unusable,
                or there is no such check.
        """
        option: Any = self.config.option
        name, asked, profile = option.conformance_backend, option.conformance_device, option.conformance_profile
        check = OneByOne()
        self.config.add_cleanup(check.close)
        try:
            tasks = ask(check, name, asked, profile)
            known = _known(self.config, tasks[0].device)
        except (UsageError, SpecError) as error:
            raise self.CollectError(f"--conformance-backend {name}: {error}") from error
        names = {f"{task.op}[{'-'.join(filter(None, (task.dtype, task.property)))}]": task for task in tasks}
        asked = [one.removeprefix(f"{NODE}::") for one in self._asked] or list(names)
        if unknown := [one for one in asked if one not in names]:
            raise self.CollectError(f"{NODE}: got {unknown[0]}; allowed: a check that --collect-only prints")
        return [
            # A text, which pytest parses as it parses the ids of its cache, for --lf.
            Check.from_parent(self, name=name, nodeid=f"{NODE}::{name}", task=names[name], check=check, known=known)
            for name in dict.fromkeys(asked)
        ]


def gone(config: pytest.Config, reports: Sequence[pytest.TestReport]) -> list[pytest.TestReport]:
    """Failures for the known deviations of which checks ran and none failed: the file is out of date."""
    results, devices = [], set()
    for one in reports:
        match = NAME.fullmatch(one.nodeid)
        assert match is not None
        xfail = getattr(one, "wasxfail", None)
        verdict = "pass" if one.passed else "fail" if one.failed else "skip" if xfail is None else "xfail"
        results.append(Result(match["op"], match["property"], match["dtype"], verdict, message=xfail))
        devices |= {value for key, value in one.user_properties if key == "device"}
    known = _known(config, *devices)
    return [
        pytest.TestReport(
            nodeid=old.nodeid,
            location=old.location,
            keywords=old.keywords,
            outcome="failed",
            longrepr=f"FAIL {new.op} / {new.property}: {new.message}",
            when="call",
        )
        for old, new, before in zip(
            reports, deviations.gone(results, known, config.option.conformance_profile), results, strict=True
        )
        if new is not before
    ]


def _known(config: pytest.Config, device: str) -> list[Deviation]:
    option: Any = config.option
    path = option.conformance_deviations or deviations.shipped(option.conformance_backend)
    return deviations.read(path, device) if path and not option.runxfail else []

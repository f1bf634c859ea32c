"""How does a repository judge its kernels in its own test run? With `pytest --conformance-backend my.kernels`.

The judge's checks of that backend join the tests, one per operation, dtype and property: `rms_norm[bfloat16-value]`.
`pytest --conformance-backend my.kernels 'conformance::rms_norm[bfloat16-value]'` runs that check alone. Without the
option nothing is added, and nothing is imported beyond this file.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

NODE = "conformance"  # the first part of the ids of the checks, and their marker


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, whose names begin with --conformance."""
    group = parser.getgroup("conformance", "kernels against the reference")
    group.addoption("--conformance-backend", metavar="MODULE", help="add the judge's checks of this backend")
    group.addoption(
        "--conformance-device", choices=("cpu", "cuda"), help="where to run (cuda if there is a CUDA device)"
    )
    group.addoption("--conformance-profile", default="ci", metavar="NAME", help="how many cases to draw (ci)")
    group.addoption("--conformance-deviations", type=Path, metavar="FILE", help="known deviations, as TOML")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and the checks if they are asked for."""
    config.addinivalue_line("markers", f"{NODE}: a check of the judge, see --conformance-backend")
    if config.getoption("conformance_backend"):
        config.pluginmanager.register(_Checks(config), "conformance_checks")


class _Checks:
    """The hooks of a test run with checks."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._asked: list[str] = []
        self._reports: list[pytest.TestReport] = []

    @pytest.hookimpl(tryfirst=True)  # after xdist has started its workers, which are given the same arguments
    def pytest_collection(self) -> None:
        """Take the ids of checks out of the arguments, where pytest would look for files of these names."""
        arguments = self._config.args
        self._asked = [one for one in arguments if one.startswith(f"{NODE}::")]
        self._config.args = [one for one in arguments if one not in self._asked]

    @pytest.hookimpl(tryfirst=True)  # before -k and -m deselect
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add one item per check, or per check that the arguments name."""
        from conformance.pytest_checks import Backend

        backend = Backend.from_parent(session, name=NODE, nodeid=NODE, path=session.path / NODE, asked=self._asked)
        items += session.genitems(backend)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember the verdicts, in the process that sees those of all others."""
        if report.nodeid.startswith(f"{NODE}::") and report.when == "call":
            self._reports.append(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Report known deviations that no check shows any more as failures, after all tests."""
        done = yield
        if self._reports and not hasattr(self._config, "workerinput"):  # only xdist's workers have that
            from conformance.pytest_checks import gone

            for report in gone(self._config, self._reports):
                self._config.hook.pytest_runtest_logreport(report=report)
        return done

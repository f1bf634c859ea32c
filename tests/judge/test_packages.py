"""An installed package brings specs, properties and peers through entry points."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance import backends, operations
from conformance.declarations import SpecError
from conformance.operations import Source
from conformance.properties import PROPERTIES
from conformance.running.runner import Task

MODULE = '''
"""Everything that a package may bring."""

from conformance.property import Property
from conformance.spec import Budget, Drawing, Spec, column_counts, row_counts


def twice(x):
    """Twice x."""
    return 2 * x


def check(trial, case):
    """Twice is a sum."""
    x = trial.inputs(case)["x"]
    assert trial.function(x).equal(x + x)


spec = Spec(
    reference=twice,
    drawing=Drawing(
        sizes={"rows": row_counts, "columns": column_counts},
        build=lambda draw, rows, columns: {"x": draw.filled(rows, columns)},
    ),
    outputs=["y"],
    grads=["x"],
    budget=Budget(roundings=0),
)
is_a_sum = Property("is_a_sum", "twice is a sum", check)
'''
POINTS = """
[conformance.specs]
twice = their_twice
[conformance.properties]
is_a_sum = their_twice:is_a_sum
[conformance.peers]
theirs = their_twice
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution on the path of this process."""
    (tmp_path / "their_twice.py").write_text(MODULE)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    caches = (operations._installed, operations.install_properties, backends.load)
    for each in caches:
        each.cache_clear()
    yield info
    PROPERTIES.pop("is_a_sum", None)
    sys.modules.pop("their_twice", None)
    for each in caches:
        each.cache_clear()


def test_a_package_brings_an_operation_a_property_and_a_peer(package: Path) -> None:
    assert "twice" in operations.specs()
    assert "theirs" in operations.peers()
    for name in ("value", "is_a_sum"):
        assert Task("theirs", "twice", name, "float16", "cpu", "dev")().verdict == "pass"
    assert "is_a_sum" in PROPERTIES


def test_a_package_may_not_take_a_name(package: Path) -> None:
    (package / "entry_points.txt").write_text("[conformance.specs]\nother = conformance.specs.swiglu\n")
    with pytest.raises(SpecError, match="entry point other: an operation is called swiglu already"):
        operations.specs()


def test_an_entry_point_that_cannot_be_loaded_is_named(package: Path) -> None:
    (package / "entry_points.txt").write_text("[conformance.properties]\nlost = no_such_module\n")
    with pytest.raises(SpecError, match=r"entry point lost of conformance\.properties: ModuleNotFoundError"):
        operations.install_properties()


def test_an_entry_point_can_be_left_out(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a gate does on a base that lacks its module."""
    (package / "entry_points.txt").write_text("[conformance.specs]\ntwice = their_twice\nlost = no_such_module\n")
    monkeypatch.setenv("CONFORMANCE_WITHOUT", "missing lost")
    assert "twice" in operations.specs()


def test_without_a_package_the_source_decides() -> None:
    assert not Source()
    assert set(operations.specs(Source(spec="conformance.specs.swiglu"))) == {"swiglu"}

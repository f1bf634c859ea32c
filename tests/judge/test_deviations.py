"""Known deviations are expected failures, and fail when they are gone."""

from dataclasses import replace
from pathlib import Path

import pytest

from conformance import peers
from conformance.declarations import SpecError
from conformance.properties import PROPERTIES
from conformance.reporting.deviations import Deviation, expected, gone, read, shipped
from conformance.running.search import Result
from conformance.specs import specs

FAILED = Result("rms_norm", "value", "float16", "fail", 3.0, 5, "rows=1", "gate G1 used 3")
PASSED = Result("rms_norm", "value", "float32", "pass", 0.5, 5)
KNOWN = Deviation("rms_norm", "value", "rounds twice")
ENTRY = "[[deviation]]\noperation = 'a'\nproperty = 'b'\nreason = 'c'"


def test_a_failure_that_is_known_is_expected() -> None:
    found = expected(FAILED, [KNOWN])
    assert (found.verdict, found.message) == ("xfail", "expected: rounds twice\ngate G1 used 3")
    assert expected(FAILED, [Deviation("rms_norm", "value", "", "bfloat16")]) == FAILED
    assert expected(PASSED, [KNOWN]) == PASSED


def test_a_deviation_that_is_gone_is_a_failure() -> None:
    assert gone([expected(FAILED, [KNOWN]), PASSED], [KNOWN], "ci")[1].verdict == "pass"  # one dtype still has it
    (found,) = gone([PASSED], [KNOWN], "ci")
    assert (found.verdict, found.message) == ("fail", "passes, but is declared as a deviation: rounds twice")
    assert gone([PASSED], [Deviation("rms_norm", "value", "", "float16")], "ci") == [PASSED]  # which did not run


def test_a_deviation_of_any_property_is_gone_when_no_property_shows_it() -> None:
    anywhere = Deviation("rms_norm", "*", "rounds twice")
    assert gone([PASSED], [anywhere], "ci") == [PASSED]
    results = [replace(PASSED, property=name) for name in PROPERTIES]
    assert {result.verdict for result in gone(results, [anywhere], "ci")} == {"fail"}
    assert gone([expected(FAILED, [anywhere]), *results], [anywhere], "ci")[1:] == results


def test_random_cases_that_do_not_show_a_deviation_prove_nothing() -> None:
    assert gone([PASSED], [KNOWN], "dev") == [PASSED]
    fixed = replace(PASSED, property="one_at_a_time")
    assert gone([fixed], [replace(KNOWN, property="one_at_a_time")], "dev")[0].verdict == "fail"


def test_a_file_of_deviations(tmp_path: Path) -> None:
    file = tmp_path / "known.toml"
    file.write_text('[[deviation]]\noperation = "rms_norm"\nproperty = "value"\nreason = "rounds twice"\n')
    assert read(file, "cpu") == [KNOWN]
    file.write_text(
        '[[deviation]]\noperation = ["rms_norm"]\nproperty = ["value", "layouts"]\nreason = "rounds twice"\n'
    )
    assert read(file, "cpu") == [KNOWN, replace(KNOWN, property="layouts")]
    file.write_text('[[deviation]]\noperation = "rms_norm"\nwhy = "?"\n')
    with pytest.raises(SpecError, match="got an entry with operation, why; allowed: operation, property"):
        read(file, "cpu")
    with pytest.raises(SpecError, match="cannot be read"):
        read(tmp_path / "none.toml", "cpu")


def test_what_the_peers_declare_exists() -> None:
    files = [path for peer in peers.PACKAGES if (path := shipped(peer))]
    assert files
    for deviation in (one for path in files for one in read(path, "cpu")):
        assert deviation.operation in specs()
        assert deviation.property in ("*", *PROPERTIES)
        assert deviation.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[deviations]]\noperation = 'rope'", r"got deviations; allowed: entries that begin with \[\[deviation\]\]"),
        ("[deviation]\noperation = 'rope'", r"got deviation; allowed: entries that begin with"),
        ("deviation = [1]", "got deviation; allowed: entries that begin with"),
        ("[[deviation]]\noperation = []\nproperty = 'b'\nreason = 'c'", "also a list of texts"),
        ("[[deviation]]\noperation = 'a'\nproperty = [1]\nreason = 'c'", "also a list of texts"),
        (f"{ENTRY}\ndtype = 'bf16'", "dtype: got 'bf16'; allowed: f"),
        (f"{ENTRY}\ndevice = 'gpu'", "device: got 'gpu'; allowed: c"),
        ("reason = '\xff'", "which cannot be read: 'utf-8' codec"),
    ],
)
def test_what_would_never_match_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "known.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(SpecError, match=message):
        read(file, "cpu")

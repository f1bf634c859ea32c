"""The file of results is whole at any time."""

import json
from pathlib import Path

import pytest

from conformance.reporting import results_file


def test_a_process_that_is_stopped_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    results_file.write(file, {"device": "cpu"}, [{"op": "rope"}])
    text = Path.write_text

    def stopped(self: Path, data: str, encoding: str) -> int:
        text(self, data[:9], encoding)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        results_file.write(file, {"device": "cpu"}, [])
    assert json.loads(file.read_text()) == {"meta": {"schema": 2, "device": "cpu"}, "results": [{"op": "rope"}]}
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_remains_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "results.json")
    for results in ([], [{"op": "rope"}]):
        results_file.write(tmp_path / "link.json", {}, results)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "results.json").read_text())["results"] == [{"op": "rope"}]


def test_a_device_is_written_to() -> None:
    results_file.write(Path("/dev/null"), {}, [])
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "got NaN; allowed: finite numbers"),
        ("[-Infinity]", "got -Infinity; allowed: finite numbers"),
        ('[{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}]', "got 'c' 2 times in an object; allowed: once"),
        ("[" * 100_000, "got too many levels of arrays and objects"),
        ("", "Expecting value"),
    ],
)
def test_a_text_that_is_not_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        results_file.parsed(text)


def test_a_number_that_json_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        results_file.write(tmp_path / "results.json", {}, [{"budget_use": float("nan")}])

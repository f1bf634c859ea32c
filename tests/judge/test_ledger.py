"""The ledger: what it records, what it refuses, what it compares, and that its file follows the published schema."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from conformance.bench.measure import NOISE
from conformance.cli import main
from conformance.gate import ledger, schema
from conformance.gate.ledger import Ledger, LedgerError, results_of

VERSIONS = {"python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}
META = {"versions": VERSIONS, "gpu": "NVIDIA H200", "driver": "580.1", "sm_clock_mhz": 1980, "backend": "fast"}
PROPERTY = {
    "op": "swiglu", "property": "value", "dtype": "bfloat16", "verdict": "pass", "budget_use": 0.3, "message": None,
}  # fmt: skip
TIME = {
    "op": "swiglu", "shape": "llama 4096x14336", "dtype": "bfloat16", "backend": "fast", "forward": [0.1, 0.11, 0.12],
    "full": [0.3, 0.31, 0.32], "device_forward": [0.09, 0.1, 0.11], "device_full": None, "peak_mebibytes": 512.0,
    "error_use": 0.2, "roofline": {"forward": 0.8, "full": 0.7, "device_forward": 0.9}, "wrong": None,
}  # fmt: skip
PRINT = {
    "op": "swiglu", "shape": "llama", "dtype": "bfloat16", "kernel": "forward_kernel", "target": "sm_90",
    "registers": 40, "stack": 0, "shared": 1024, "load": 16, "store": 16, "instructions": 400, "problem": None,
}  # fmt: skip
ALL = [PROPERTY, TIME, PRINT, PRINT]


def changed(result: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(result), **values}


def file(path: Path, *results: dict[str, Any], **meta: Any) -> str:
    path.write_text(json.dumps({"meta": {**META, **meta}, "results": results}))
    return str(path)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recorded() -> Ledger:
    found = Ledger("NVIDIA H200")
    assert found.update(results_of(META, ALL)) == (4, [])
    return found


def test_update_writes_one_file_per_card_that_follows_the_schema(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [file(desk / "gpu.json", *ALL), file(desk / "cpu.json", PROPERTY, gpu=None, sm_clock_mhz=None, driver=None)]
    assert main(["ledger", "update", *files]) == 0
    assert sorted(path.name for path in (desk / "ledger").iterdir()) == ["cpu.json", "nvidia-h200.json"]
    content = json.loads((desk / "ledger" / "nvidia-h200.json").read_text())
    assert schema.problem(content, schema.LEDGER, schema.LEDGER) is None
    assert (
        content["meta"]["schema"]
        == ledger.SCHEMA
        == schema.LEDGER["properties"]["meta"]["properties"]["schema"]["const"]
    )
    assert [entry["kind"] for entry in content["results"]] == ["fingerprint", "fingerprint", "property", "time"]
    (time,) = (entry for entry in content["results"] if entry["kind"] == "time")
    assert time["milliseconds"] == {"forward": 0.11, "full": 0.31, "device_forward": 0.1}
    assert main(["ledger", "show"]) == 0
    shown = capsys.readouterr().out
    assert "fast: swiglu / value / bfloat16: 30 % of the error budget" in shown
    assert "device_forward 0.1000 ms 90 %" in shown


def test_it_ratchets_and_loosens_only_for_a_reason(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = desk / "ledger" / "nvidia-h200.json"
    assert main(["ledger", "update", file(desk / "one.json", *ALL)]) == 0
    better = changed(TIME, device_forward=[0.07, 0.08, 0.09])
    assert main(["ledger", "update", file(desk / "two.json", better)]) == 0
    worse = changed(TIME, device_forward=[0.09, 0.1, 0.11])
    before = path.read_bytes()
    capsys.readouterr()
    assert main(["ledger", "update", file(desk / "three.json", worse)]) == 1
    assert path.read_bytes() == before
    printed = capsys.readouterr().out
    assert "swiglu / llama 4096x14336 / bfloat16: device_forward: got 0.1000 ms; allowed: 0.0849" in printed
    assert main(["ledger", "update", str(desk / "three.json"), "--because", "the new driver"]) == 0
    (time,) = (entry for entry in ledger.read(path).entries.values() if entry["kind"] == "time")
    assert (time["milliseconds"]["device_forward"], time["because"]) == (0.1, "the new driver")
    assert not list(path.parent.glob(".*"))


def test_noise_neither_fails_nor_loosens(recorded: Ledger) -> None:
    """Any number of runs that are a little worse leave the record where it was."""
    before = copy.deepcopy(recorded.entries)
    noisy = changed(TIME, forward=[0.1, 0.11 * (NOISE**2 - 1e-6), 0.12])
    used = changed(PROPERTY, budget_use=0.39)
    for _ in range(5):
        assert recorded.update(results_of(META, [noisy, used])) == (0, [])
    assert recorded.entries == before


@pytest.mark.parametrize(
    ("worse", "sentence"),
    [
        (changed(PROPERTY, budget_use=0.41), "budget use: got 41 %; allowed: 40 % (before: 30 %)"),
        (
            changed(PROPERTY, verdict="fail", message="gate G1\nmore"),
            "was right in the ledger, and is not now: gate G1",
        ),
        (changed(PROPERTY, verdict="skip", message="no C++"), "was right in the ledger, and is not now: no C++"),
        (changed(TIME, full=[0.3, 0.34, 0.4]), "full: got 0.3400 ms; allowed: 0.3289 (the ledger 0.3100)"),
        (changed(TIME, device_forward=None), "device_forward: was timed in the ledger, and is not now"),
        (changed(TIME, wrong="gate G2"), "was right in the ledger, and is not now: gate G2"),
        (changed(TIME, peak_mebibytes=530.0), "peak memory: got 530.0 MiB; allowed: 517.1"),
        (changed(PRINT, stack=8), "swiglu / llama / bfloat16 / forward_kernel / sm_90 / 0: stack: got 8 bytes"),
        (changed(PRINT, registers=51), "registers: got 51; allowed: 50 (before: 40)"),
        (changed(PRINT, instructions=501), "instructions: got 501; allowed: 500 (before: 400)"),
        (changed(PRINT, store=8), "widest store: got 8 bytes; allowed: 16, as before"),
    ],
)
def test_what_is_worse_is_one_sentence(worse: dict[str, Any], sentence: str, recorded: Ledger) -> None:
    (found,) = recorded.regressions(results_of(META, [worse]))
    assert sentence in found
    assert "\n" not in found
    before = copy.deepcopy(recorded.entries)
    assert recorded.update(results_of(META, [worse])) == (0, [found])
    assert recorded.entries == before
    assert recorded.update(results_of(META, [worse]), "a reason")[0] == 1
    assert recorded.regressions(results_of(META, [worse])) == []


def test_another_clock_compares_shares_of_the_roofline_alone(recorded: Ledger) -> None:
    """Milliseconds, and memory, count within one environment; a share counts against the peak rates of its own run."""
    slow = changed(TIME, full=[0.6, 0.62, 0.64], forward=[0.2, 0.22, 0.24], device_forward=[0.18, 0.2, 0.22])
    other = {**META, "sm_clock_mhz": 1200}
    assert recorded.regressions(results_of({**META, "sm_clock_mhz": 1950}, [slow])) != []
    assert recorded.regressions(results_of(other, [slow])) == []
    lower = changed(slow, roofline={**TIME["roofline"], "full": 0.5})
    (found,) = recorded.regressions(results_of(other, [lower]))
    assert "full: got 50 % of the roofline; allowed: 62 % (the ledger, with other versions or clock, 70 %)" in found
    assert recorded.update(results_of(other, [slow])) == (1, [])
    assert set(recorded.environments) == {"e1", "e2"}
    assert recorded.regressions(results_of(META, [TIME])) == []


def test_small_losses_do_not_add_up_over_environments(recorded: Ledger) -> None:
    """Each driver loses a little: the best environment counts, until a reason gives it up."""
    for number, share in enumerate((0.65, 0.6, 0.55)):
        lower = changed(TIME, roofline={"full": share})
        used = changed(PROPERTY, budget_use=0.3 + 0.09 * (number + 1))
        changes, refused = recorded.update(results_of({**META, "driver": f"581.{number}"}, [lower, used]))
        assert (changes > 0) == (number == 0)
        assert len(refused) == (0 if number == 0 else 2), refused
    worse = results_of({**META, "driver": "590"}, [changed(PROPERTY, budget_use=0.6)])
    assert recorded.update(worse, "a new compiler") == (1, [])
    better = results_of({**META, "driver": "590"}, [changed(PROPERTY, budget_use=0.55)])
    assert recorded.update(better) == (1, [])
    assert recorded.update(results_of({**META, "driver": "591"}, [changed(PROPERTY, budget_use=0.6)])) == (1, [])


@pytest.mark.parametrize(
    ("result", "meta", "words"),
    [
        (1, {}, "a result has another form: "),
        (changed(TIME, full=0.3), {}, "a result has another form: "),
        (changed(TIME, full=[0.3]), {}, "a result has another form: "),
        (changed(TIME, full=["a", "b", "c"]), {}, "as a ledger, file.results[0].milliseconds.full: got 'b'; allowed: "),
        (changed(PROPERTY, budget_use="0.3"), {}, "as a ledger, file.results[0].budget_use: got '0.3'; allowed: "),
        (PROPERTY, {"backend": None}, "as a ledger, file.results[0].backend: got None; allowed: string"),
        (PROPERTY, {"sm_clock_mhz": "1980"}, "as a ledger, file.meta.environments.e1.sm_clock_mhz: got '1980'; "),
        (PROPERTY, {"versions": 3}, "holds no results; "),
        (changed(PROPERTY, op=["swiglu"]), {}, "as a ledger, file.results[0].op: got ['swiglu']; allowed: string"),
    ],
)
def test_a_file_of_another_form_is_one_line(
    result: Any, meta: dict[str, Any], words: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(desk / "odd.json", result, **meta)
    assert main(["ledger", "update", path]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"conformance: {path}: {words}") and printed.count("\n") == 1
    assert not (desk / "ledger").exists()


def test_two_results_of_one_check_are_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second would replace the first, even if it is worse."""
    for second in (changed(PROPERTY, budget_use=0.9), changed(PROPERTY, verdict="fail")):
        path = file(desk / "twice.json", PROPERTY, second)
        assert main(["ledger", "update", path]) == 2
        said = f"conformance: {path}: swiglu / value / bfloat16: got 2 results; allowed: one\n"
        assert capsys.readouterr().err == said
    assert not (desk / "ledger").exists()


def test_a_ledger_that_cannot_be_written_is_one_line(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(desk / "run.json", PROPERTY)
    assert main(["ledger", "update", path, "--folder", path]) == 2
    said = f"conformance: --folder: {path}/nvidia-h200.json cannot be written: File exists\n"
    assert capsys.readouterr().err == said


def test_a_ledger_holds_one_card(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if its file was renamed, or if the names of two cards differ by signs alone."""
    assert main(["ledger", "update", file(desk / "one.json", PROPERTY)]) == 0
    other = file(desk / "other.json", PROPERTY, gpu="NVIDIA-H200")
    assert main(["ledger", "update", other]) == 2
    said = f"{other}: got results of NVIDIA-H200; allowed: of NVIDIA H200, as ledger/nvidia-h200.json\n"
    assert capsys.readouterr().err == f"conformance: {said}"
    assert ledger.file_name("摩尔线程 S4000") == "摩尔线程-s4000.json"


def test_a_number_that_is_too_large_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = desk / "run.json"
    path.write_text(Path(file(path, PROPERTY)).read_text().replace("0.3", "1e999"))
    assert main(["ledger", "update", str(path)]) == 2
    assert "file.results[0].budget_use: got inf; allowed: " in capsys.readouterr().err


def test_a_number_that_is_none_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(desk / "run.json", changed(PROPERTY, budget_use=float("nan")))
    assert main(["ledger", "update", path]) == 2
    assert capsys.readouterr().err == f"conformance: {path}: no JSON: got NaN; allowed: finite numbers\n"


def test_fingerprints_of_another_triton_are_not_compared(recorded: Ledger) -> None:
    other = {**META, "versions": {**VERSIONS, "triton": "3.9.0"}}
    assert recorded.regressions(results_of(other, [changed(PRINT, registers=200)])) == []


def test_results_of_a_gate_are_those_of_its_head() -> None:
    row = {"kind": "time", "verdict": "FASTER", "regressions": [], "base": changed(TIME, full=[9, 9, 9]), "head": TIME}
    lost = {"kind": "property", "verdict": "lost", "regressions": ["x"], "base": PROPERTY, "head": None}
    (entry,) = results_of(META, [row, lost]).entries
    assert entry["milliseconds"]["full"] == 0.31


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda c: c["meta"].update(schema=2), "file.meta.schema: got 2; allowed: 1"),
        (lambda c: c["meta"].pop("card"), "file.meta: has no card"),
        (lambda c: c["results"][-1].update(peak_mebibytes="much"), "peak_mebibytes: got 'much'"),
        (lambda c: c["results"][-1]["milliseconds"].update(full=-1), "full: got -1; allowed: 0 or more"),
        (lambda c: c["results"][0].update(colour="red"), "got 'colour'; allowed: kind"),
        (lambda c: c["results"][0].update(environment="e9"), "environment: got 'e9'"),
        (lambda c: c["results"].append(c["results"][0]), "swiglu / llama / bfloat16 / forward_kernel / sm_90 / 0: is"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(break_it: Any, words: str, recorded: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    recorded.write(path)
    content = json.loads(path.read_text())
    break_it(content)
    path.write_text(json.dumps(content))
    with pytest.raises(LedgerError) as refused:
        ledger.read(path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("update",), "got no file"),
        (("update", "absent.json"), "absent.json: No such file"),
        (("update", "text.json"), "text.json: no JSON"),
        (("update", "list.json"), "list.json: holds no results"),
        (("update", "later.json"), "later.json: meta.schema: got 3; allowed: 2"),
        (("update", "results.json", "--because", " "), "--because: got an empty text"),
        (("show",), "got no ledger in ledger"),
        (("show", "results.json"), "results.json: file.meta: has no schema"),
        (("burn",), "invalid choice: 'burn'"),
    ],
)
def test_a_usage_error_is_one_line(
    arguments: tuple[str, ...], words: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "text.json").write_text("no")
    (desk / "list.json").write_text("[]")
    (desk / "later.json").write_text('{"meta": {"schema": 3}, "results": []}')
    file(desk / "results.json", *ALL)
    assert main(["ledger", *arguments]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1
    assert not (desk / "ledger").exists()

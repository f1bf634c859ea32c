"""The oracles of other projects find a kernel that is far off and pass a right one; the document counts them."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conformance import backends
from conformance.running.runner import Task
from conformance.running.search import Result
from conformance.specs import specs
from tests.judge.power import automatic, document, measure
from tests.judge.power.oracles import LIGER, ORACLES, rejecting
from unsloth_ref.kernels import rms_norm


def test_each_oracle_finds_a_wrong_kernel_and_passes_the_reference() -> None:
    spec = specs()["rms_norm"]
    assert not rejecting(spec, rms_norm, "cpu")
    wrong = rejecting(spec, lambda x, weight, *eps, **options: 2 * rms_norm(x, weight, *eps, **options), "cpu")
    assert wrong == {oracle.name for oracle in ORACLES}


def test_every_kernel_of_the_tests_is_measured() -> None:
    kernels = measure.kernels("cpu")
    assert {kernel.population for kernel in kernels} == set(document.POPULATIONS)
    assert {kernel.op for kernel in kernels} == set(backends.OPERATIONS)
    assert set(LIGER) <= set(backends.OPERATIONS)


def test_the_document_is_that_of_the_results() -> None:
    root = Path(__file__).parents[2]
    files = [
        json.loads((root / "docs/results/power" / name).read_text())
        for name in ("wrong_cpu.json", "wrong_cpu_2.json", "right_h200.json")
    ]
    mutants = json.loads((root / "docs/results/power/mutants_cpu.json").read_text())
    reasons = automatic.reasons(root / document.SURVIVORS)
    peers = {
        name: json.loads((root / f"docs/results/power/{name}.json").read_text())
        for name in ("liger_cpu", "liger_cpu_2")
    }
    text = document.text(files, peers, [mutants], reasons)
    assert text == (root / "docs/judge-power.md").read_text(), "run `make figures`"
    survivors = {one["mutant"] for one in mutants["results"] if one["verdict"] in ("survived", "unreached")}
    assert set(reasons) == survivors
    assert all(len(reason) > 40 for reason in reasons.values())


def kernel(population: str, rejected_by: list[str]) -> dict[str, Any]:
    asked = [measure.JUDGE, ORACLES[0].name]
    name = f"tests.judge.{population}.one"
    return {"backend": name, "op": "rope", "population": population, "asked": asked, "rejected_by": rejected_by}


def result(name: str, dtype: str, message: str, verdict: str = "fail") -> dict[str, Any]:
    case = "batch=1 length=1 fill=randn"
    return {"op": "rope", "property": name, "dtype": dtype, "verdict": verdict, "case": case, "message": message}


META = {"versions": {"torch": "2", "triton": None}, "device": "cuda", "gpu": "a card", "profile": "gpu"}


def test_the_document_counts_what_each_oracle_rejects() -> None:
    """Files of several parts count together; what was not measured has no column."""
    oracle = ORACLES[0].name
    parts = [
        {"meta": META, "kernels": [kernel("mutants", [oracle]), kernel("cheats", [measure.JUDGE])]},
        {"meta": META, "kernels": [kernel("right", [oracle])]},
    ]
    text = document.text(parts, {})
    assert "Measured on a card (torch 2)." in text
    assert "| test | mutants found | cheats found | right rejected |\n|---|---|---|---|" in text
    assert f"| {measure.JUDGE} | 0 of 1 | 1 of 1 | 0 of 1 |" in text
    assert f"| {oracle} | 1 of 1 | 0 of 1 | 1 of 1 |" in text
    assert f"| {ORACLES[1].name} | - | - | - |" in text
    assert "1 of 2 wrong kernels are found by the judge alone." in text
    assert "- passed: `tests.judge.mutants.one` (rope, mutants)" in text
    assert f"| `one` | rope | {oracle} |" in text


def test_the_document_says_which_population_was_measured_where() -> None:
    on_cpu = META | {"device": "cpu", "gpu": None}
    parts = [
        {"meta": on_cpu, "kernels": [kernel("mutants", []), kernel("cheats", [])]},
        {"meta": META, "kernels": [kernel("right", [])]},
    ]
    text = document.text(parts, {})
    assert "Measured on a CPU (torch 2): mutants, cheats. Measured on a card (torch 2): right. All tests" in text
    assert "| test | mutants found on a CPU | cheats found on a CPU | right rejected on a card |" in text
    assert (
        "measure --population mutants cheats --device cpu --profile gpu --jobs 16 --json out/power_cpu.json\n" in text
    )
    assert "write out/power_cpu.json out/power_cuda.json\n" in text


def test_the_last_file_that_holds_a_kernel_counts() -> None:
    """One population may be measured with several versions; the document says of which operations."""
    older, newer = META, META | {"versions": {"torch": "3"}}
    other = kernel("mutants", []) | {"backend": "tests.judge.mutants.other", "op": "swiglu"}
    parts = [
        {"meta": older, "kernels": [kernel("mutants", []), other, kernel("right", [])]},
        {"meta": newer, "kernels": [kernel("mutants", [measure.JUDGE])]},
    ]
    text = document.text(parts, {})
    assert (
        "Measured on a card (torch 2): mutants of swiglu; right. Measured on a card (torch 3): mutants of rope." in text
    )
    assert f"| {measure.JUDGE} | 1 of 2 | 0 of 1 |" in text
    assert "| test | mutants found | right rejected |" in text


@pytest.mark.parametrize("other", [{"device": "cpu", "gpu": None}, {"profile": "ci"}])
def test_a_population_is_measured_on_one_device_under_one_profile(
    other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    for path, meta in zip(paths, [META, META | other], strict=True):
        path.write_text(json.dumps({"meta": meta, "kernels": [kernel("mutants", [])]}))
    monkeypatch.setattr("sys.argv", ["power", "write", *map(str, paths), "--to", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit):
        runpy.run_module("tests.judge.power", run_name="__main__")
    assert "files: " in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_the_document_lists_the_findings_of_each_library() -> None:
    """What differs in numbers alone is one finding; a known difference has its reason; each has a command."""
    found = [
        result("value", "float32", "gate G1 used 2.5 of the budget\n  measured 3, allowed 1"),
        result("gradients", "float16", "gate G1 used 7 of the budget"),
        result("one_at_a_time", "float16", "expected: has no <table>\nraised NotImplementedError", "xfail"),
        result("layouts", "float32", "", "skip"),
        result("determinism", "float32", "", "pass"),
    ]
    peer = {"meta": META | {"backend": "liger"}, "results": found}
    text = document.text([{"meta": META, "kernels": [kernel("wrong", [])]}], {"liger": peer, "liger-2": peer})
    assert "| liger (liger-2) | a card, profile `gpu` | 1 | 4 | 2 | 1 |" in text
    assert "- `value`, `gradients` (float32, float16): gate G1 used 2.5 of the budget; measured 3, allowed 1\n" in text
    known = "- `one_at_a_time` (float16), known: has no \\<table\\>. Seen first: raised NotImplementedError\n"
    assert known in text
    command = (
        "python -m conformance repro --backend liger --device cuda 'rope float32 value batch=1 length=1 fill=randn'"
    )
    assert f"  ```sh\n  {command}\n  ```" in text


def mutant(verdict: str, op: str = "rope") -> dict[str, Any]:
    killed_by = [["value", "float32", "rows=1", "gate G1"]] if verdict in ("killed", "raised") else []
    name = f"{op}.py:1:flipped:{verdict}"
    return {
        "op": op,
        "mutant": name,
        "kind": "flipped",
        "verdict": verdict,
        "killed_by": killed_by,
        "diff": "-",
    }


def test_the_document_counts_automatic_mutants_and_explains_survivors() -> None:
    drawn = {"dtypes": ["float32"], "sample": 4, "seed": 7, "commit": "0123456789", "kill_rate": 0.5}
    verdicts = ["killed", "raised", "survived", "same bits", "unreached"]
    file = {"meta": META | drawn, "results": [*map(mutant, verdicts), mutant("equivalent", "swiglu")]}
    short = json.loads(automatic.brief(file))
    assert short["results"][0] == {
        "op": "rope", "mutant": "rope.py:1:flipped:killed", "kind": "flipped", "verdict": "killed", "property": "value"
    }  # fmt: skip
    reasons = {"rope.py:1:flipped:survived": "it is dear", "rope.py:1:flipped:unreached": "only on a card"}
    text = document.text([{"meta": META, "kernels": []}], {}, [short], reasons)
    assert "| rope | 5 | 1 | 2 | 2 | 50.0 % |\n| swiglu | 1 | 1 | 0 | 0 | - |\n| all | 6 | 2 | 2 | 2 | 50.0 % |" in text
    assert (
        "On a CUDA device (torch 2), commit 0123456, profile `gpu`, float32: 4 per operation, drawn with seed 7."
        in text
    )
    assert "- rope, mutant rope.py:1:flipped:survived: it is dear\n" in text
    assert "mutate --device cuda --profile gpu --sample 4 --seed 7 --dtype float32 --json out/mutants.json\n" in text
    with pytest.raises(KeyError, match="unreached"):
        document.text([{"meta": META, "kernels": []}], {}, [short], {"rope.py:1:flipped:survived": "it is dear"})


def test_the_judge_checks_a_kernel_that_ends_the_process_of_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tasks: list[Task], on_result: Callable[[Task, Result], None], **how: Any) -> None:
        for task in tasks:
            verdict = "fail" if task.property in ("oracles", "value") else "pass"
            on_result(task, Result(task.op, task.property, task.dtype, verdict))
            if verdict == "fail" and how.get("stop_at_failure"):
                return

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which measure sets
    one = measure.Kernel("somewhere", "packed_attention", "wrong", ("value",), "float32")
    (found,) = measure.measure([one], "cpu", "dev", 1, lambda found: None)["kernels"]
    assert set(found["rejected_by"]) == set(found["asked"]) == {measure.JUDGE, *(o.name for o in ORACLES)} - {"liger"}
    assert [finding["property"] for finding in found["findings"]] == ["value"]


def test_mutants_of_a_kernel_that_fails_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tasks: list[Task], on_result: Callable[[Task, Result], None], **how: int) -> None:
        (task,) = tasks
        on_result(task, Result(task.op, task.property, task.dtype, "fail", message="raised InterpreterError"))

    monkeypatch.setattr(measure, "run", run)
    mutant = next(kernel for kernel in measure.kernels("cpu") if kernel.population == "mutants")
    with pytest.raises(RuntimeError, match=f"{mutant.op}: the kernel without a change fails value: raised Interp"):
        measure.measure([mutant], "cpu", "dev", 1, lambda found: None)

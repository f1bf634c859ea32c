"""Launches are seen, cases are explored without running kernels, and cover what random cases miss."""

# pyright: reportPrivateUsage=false

import importlib
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from conformance.backends import load
from conformance.case import Case
from conformance.instruments import variants
from conformance.instruments.variants import launches
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.property import Property
from conformance.running.coverage import Explored, _with_many_rows, drawn_cases, explore, shown
from conformance.running.search import Result, reproduce, search
from conformance.specs import specs
from conformance.tolerances.gates import Failure
from conformance.trial import Trial
from tests.processes import PATIENCE

CI = replace(PROFILES["ci"], shrink_seconds=PATIENCE)


def trial_of(op: str, dtype: torch.dtype = torch.float32) -> Trial:
    judged = load("fast", "cpu")
    return Trial(specs()[op], judged.functions[op], dtype, "cpu")


def test_drawn_cases_do_not_depend_on_the_modules_that_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypothesis also draws the numbers of modules, of which the processes of a run have loaded different ones."""
    spec, count = specs()["swiglu"], 200
    before = drawn_cases.__wrapped__(spec, 2**20, (), count)
    (tmp_path / "of_odd_numbers.py").write_text(f"NUMBERS = {[*range(101, 999, 2)]}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_odd_numbers")
    assert drawn_cases.__wrapped__(spec, 2**20, (), count) == before


def test_a_launch_is_seen_with_its_settings() -> None:
    trial = trial_of("cross_entropy")
    case = trial.spec.parse("tokens=2 vocab=9000 label_smoothing=0.1")
    with launches() as seen:
        trial.run(case)
    by_kernel = {variant.kernel: dict(variant.settings) for variant in seen.variants}
    assert by_kernel.keys() >= {"prepare_kernel", "cross_entropy_total_kernel", "divided_sum_kernel"}
    total = by_kernel["cross_entropy_total_kernel"]
    assert total["SMOOTHING"] == "True" and total["SEGMENTS"] == "2" and total["segments"] == "is not 1"
    assert total["programs"] == "<16" and total["logits_ptr"] == "float32" and total["column_stride"] == "is 1"


def test_a_dry_call_runs_no_kernel_and_a_real_one_afterwards_does() -> None:
    trial = trial_of("swiglu")
    case = trial.spec.case(2, 8)
    with launches(run=False) as dry:
        trial.run(case)
    with launches() as seen:
        with launches(run=False):
            trial.run(case.resized(hidden=5000))
        run = trial.run(case)
    assert dry.variants == seen.variants and dry.programs == seen.programs
    trial.judge(case, run)


def test_every_setting_that_varies_is_explored_in_pairs() -> None:
    explored = explore(trial_of("cross_entropy"), CI)
    found = {shown(pair) for pair in explored.pairs}
    assert "cross_entropy_total_kernel with SEGMENTS=2, SMOOTHING=True" in found
    assert "cross_entropy_backward_kernel with SOFTCAP=True, tiles_per_row is not 1" in found
    every = explored.reached({v for one in (*explored.drawn, *explored.beyond) for v in one.variants})
    assert every.share == 1 and every.explored == len(explored.pairs)


@pytest.mark.parametrize("op", [op for op, spec in specs().items() if spec.drawing.counts])
def test_no_more_is_counted_than_the_reference_computes_in_seconds(op: str) -> None:
    trial = trial_of(op)
    case, most = trial.spec.case(5, 8), trial.spec.drawing.counts
    counted = [_with_many_rows(trial, case, PROFILES["gpu"].elements, Random(seed)) for seed in range(40)]
    for name in most:
        largest = max(one.size(name) for one in counted)
        assert case.size(name) < largest <= most[name]


def share_of(explored: Explored, cases: list[Case]) -> float:
    known = {one.case: one.variants for one in (*explored.drawn, *explored.beyond)}
    return explored.reached({variant for case in cases for variant in known[case]}).share


@pytest.mark.parametrize("op", ["cross_entropy", "rms_norm"])
def test_a_cover_reaches_more_than_random_cases_and_costs_no_more_than_the_costliest(op: str) -> None:
    explored = explore(trial_of(op), CI)
    cover = explored.cover(12, 4)
    assert len(cover) == 12
    assert share_of(explored, cover) > 1.2 * share_of(explored, [one.case for one in explored.drawn[:12]])
    cost = {one.case: one.cost for one in (*explored.drawn, *explored.beyond)}
    assert max(cost[case] for case in cover) <= explored.most


def test_what_launches_no_triton_kernel_has_nothing_to_cover() -> None:
    explored = explore(trial_of("lora_linears"), CI)
    assert not explored.pairs and not explored.cover(4, 4)
    result = search(trial_of("lora_linears"), PROPERTIES["metadata"], CI, "float32")
    assert result.reached is None and result.as_dict()["coverage"] is None


def check(trial: Trial, case: Case) -> None:
    """Fails where a loss of several segments is smoothed."""
    with launches() as seen:
        trial.run(case)
    for variant in seen.variants:
        found = dict(variant.settings)
        if found.get("SMOOTHING") == "True" and found.get("segments") == "is not 1":
            raise Failure("several segments are smoothed")


@pytest.fixture(scope="module")
def found() -> Result:
    prop = Property("planted", "", check, share=0.4)
    results = [
        search(trial_of("cross_entropy", dtype), prop, CI, str(dtype).removeprefix("torch."))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    return next(result for result in results if result.verdict == "fail")


def test_a_fault_that_needs_a_size_and_an_option_is_found_by_a_property_with_few_cases(found: Result) -> None:
    assert found.message == "several segments are smoothed"
    assert found.as_dict()["coverage"] > 0


def test_the_case_that_found_it_is_simplified(found: Result) -> None:
    case = specs()["cross_entropy"].parse(str(found.case))
    assert case.size("tokens") == 1 and dict(case.options) == {"label_smoothing": 0.1}
    assert (case.fill, case.layout, case.seed) == ("randn", "contiguous", 0)
    prop = Property("planted", "", check)
    assert reproduce(trial_of("cross_entropy"), prop, case, "float32").verdict == "fail"


def kernel_function(columns: int, x: torch.Tensor, COLUMNS: "tl.constexpr") -> None:  # noqa: F821
    """The Python function of a kernel that is never run."""


def test_a_launch_of_compiled_code_past_triton_is_seen() -> None:
    parameters = [
        SimpleNamespace(name=name, do_not_specialize=False, do_not_specialize_on_alignment=name == "columns")
        for name in ("columns", "x", "COLUMNS")
    ]
    kernel = SimpleNamespace(fn=kernel_function, arg_names=[one.name for one in parameters], params=parameters)
    module, calls = SimpleNamespace(_compiled={}), []
    variants._observe(module)
    by_triton = variants._observing(lambda *arguments, **options: "compiled", run=True)
    with launches() as seen:
        by_triton(kernel, 33, torch.zeros(4), COLUMNS=64, num_warps=4, grid=(20,))
        compiled = "compiled", lambda *arguments: calls.append(arguments), "function", "metadata", ()
        _, run, *_ = module._compiled.setdefault("key", compiled)
    first = {
        "columns": "is not 1", "x": "float32", "COLUMNS": "<256", "num_warps": "4", "programs": "<256",
        "aligned": "True",
    }  # fmt: skip
    assert [dict(variant.settings) for variant in seen.variants] == [first]
    arguments = (1, 1, 1, "stream", "function", "metadata", None, None, None, 1, 4096, 64)
    with launches() as again:
        run(*arguments)
    assert calls == [arguments]
    assert [dict(variant.settings) for variant in again.variants] == [first | {"columns": "is 1", "programs": "1"}]

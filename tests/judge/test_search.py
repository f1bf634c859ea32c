"""The search: repeated calls on a GPU, which a backend may have recorded, cases not checked, options that lack."""

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import operations
from conformance.case import Case
from conformance.operations import Source
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.property import Property
from conformance.reporting.report import failures
from conformance.running.coverage import drawn_cases
from conformance.running.search import POOL, Result, reproduce, search
from conformance.specs import specs
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Trial
from tests.processes import PATIENCE
from unsloth_ref import kernels as reference
from unsloth_ref.kernels import swiglu


@pytest.mark.parametrize(("device", "verdict", "calls"), [("cpu", "pass", 1), ("cuda", "fail", 2)])
def test_a_fault_of_repeated_calls_is_found_on_a_gpu(device: str, verdict: str, calls: int) -> None:
    seen: list[Case] = []

    def check(trial: Trial, case: Case) -> None:
        seen.append(case)
        if len(seen) > 1:
            raise Failure("wrong")

    spec = specs()["swiglu"]
    prop = Property("repeated", "", check)
    result = reproduce(Trial(spec, swiglu, torch.float32, device), prop, spec.case(2, 3), "float32")
    assert (result.verdict, len(seen)) == (verdict, calls)
    assert result.message == ("in a repeated call: wrong" if calls == 2 else None)


def test_one_case_in_three_is_repeated() -> None:
    seen: list[Case] = []
    spec = specs()["swiglu"]
    cases = [spec.case(rows, 3) for rows in range(1, 8)]
    prop = Property("repeated", "", lambda trial, case: seen.append(case), lambda spec, profile: cases)
    result = search(Trial(spec, swiglu, torch.float32, "cuda"), prop, PROFILES["ci"], "float32")
    assert (result.verdict, [seen.count(case) for case in cases]) == ("pass", [2, 1, 1, 2, 1, 1, 2])


def test_a_fault_of_repeated_calls_is_reduced_to_its_smallest_case() -> None:
    seen: list[Case] = []

    def check(trial: Trial, case: Case) -> None:
        seen.append(case)
        if dict(case.sizes)["hidden"] >= 2 and seen.count(case) > 1:
            raise Failure("wrong")

    spec = specs()["swiglu"]
    trial = Trial(spec, swiglu, torch.float32, "cuda")
    result = search(trial, Property("repeated", "", check), PROFILES["ci"], "float32")
    assert result.message == "in a repeated call: wrong"
    assert (result.case or "").startswith("rows=1 hidden=2 ")


def test_a_property_draws_the_same_cases_whatever_modules_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the processes of pytest and of the command line, which have loaded different ones, for `repro` to fit both."""
    profile = replace(PROFILES["ci"], examples=200, elements=2**20, explored=0)

    def drawn() -> list[str]:
        cases: list[str] = []
        trial = Trial(specs()["swiglu"], swiglu, torch.float32, "cpu")
        search(trial, Property("any", "", lambda trial, case: None), profile, "float32", cases.append)
        return cases

    before = drawn()
    (tmp_path / "of_even_numbers.py").write_text(f"NUMBERS = {[*range(100, 999, 2)]}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_even_numbers")
    assert drawn() == before


@pytest.mark.parametrize("columns", [65, 100, 300])
def test_a_drawn_failure_that_needs_an_option_and_a_wide_row_is_reduced_to_a_small_case(columns: int) -> None:
    """To the closest size of the drawn cases: Hypothesis keeps to one near a tile's edge once it has drawn it."""

    def check(trial: Trial, case: Case) -> None:
        if case.size("x_1") >= columns and dict(case.options).get("mode") == "sum":
            raise Failure("wrong")

    (spec,) = operations.specs(Source(f"{__name__}:divided", "x=randn(4,32) mode=mean|sum power=0.5")).values()
    trial = Trial(spec, divided, torch.float32, "cpu")
    result = search(trial, Property("wide", "", check), PROFILES["ci"], "float32")
    assert not result.cut_short
    found = spec.parse(result.case or "")
    assert (found.size("x_0"), dict(found.options)) == (1, {"mode": "sum"})
    drawn = drawn_cases(spec, PROFILES["ci"].elements, tuple(spec.drawing.options), POOL)
    assert columns <= found.size("x_1") <= min(case.size("x_1") for case in drawn if case.size("x_1") >= columns)


def divided(x: torch.Tensor, power: float = 1.0, mode: str = "mean") -> torch.Tensor:
    """Rows divided by a power of the mean, or of the sum, of their absolute values."""
    size = x.abs().mean(-1, keepdim=True) if mode == "mean" else x.abs().sum(-1, keepdim=True)
    return x / (size + 1.0) ** power


@pytest.mark.parametrize(("seconds", "cut_short"), [(0.05, True), (PATIENCE, False)])
def test_a_search_for_a_smaller_case_that_time_ends_says_so(seconds: float, cut_short: bool) -> None:
    def check(trial: Trial, case: Case) -> None:
        if dict(case.sizes)["hidden"] >= 2:
            time.sleep(0.04 if cut_short else 0.0)
            raise Failure("wrong")

    trial = Trial(specs()["swiglu"], swiglu, torch.float32, "cpu")
    profile = replace(PROFILES["ci"], shrink_seconds=seconds)
    result = search(trial, Property("large", "", check), profile, "float32", covering=[])
    assert (result.verdict, result.cut_short, result.as_dict()["cut_short"]) == ("fail", cut_short, cut_short)
    line = f"  smallest case: {result.case}" + " (so far: the time for finding a smaller one ran out)" * cut_short
    printed = failures([result], "mine", "cpu").splitlines()
    assert line in printed
    assert printed[-1].endswith(f"{result.case}'")  # the command has the case alone


@pytest.mark.parametrize(("said", "verdict", "examples"), [(7, "skip", 0), (3, "pass", 4)])
def test_cases_that_are_not_checked_are_no_examples(said: int, verdict: str, examples: int) -> None:
    def check(trial: Trial, case: Case) -> None:
        if dict(case.sizes)["rows"] <= said:
            raise Unchecked("only a GPU can tell")

    spec = specs()["swiglu"]
    prop = Property("partial", "", check, lambda spec, profile: [spec.case(rows, 3) for rows in range(1, 8)])
    result = search(Trial(spec, swiglu, torch.float32, "cpu"), prop, PROFILES["ci"], "float32")
    assert (result.verdict, result.examples) == (verdict, examples)
    assert result.message == ("only a GPU can tell" if verdict == "skip" else None)


def without(*lacking: str) -> Callable[..., torch.Tensor]:
    """A rms_norm that lacks these options: only their defaults are implemented."""

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, **options: Any) -> torch.Tensor:
        for name in options.keys() & {*lacking}:
            raise NotImplementedError(f"{name}: got {options[name]!r}")
        return reference.rms_norm(x, weight, eps, **options)

    return rms_norm


DRAWN = replace(PROFILES["dev"], explored=0, examples=50)  # enough to draw each value of an option


def found(function: Callable[..., torch.Tensor], name: str, op: str = "rms_norm") -> Result:
    trial = Trial(specs()[op], function, torch.float32, "cpu")
    return search(trial, PROPERTIES[name], DRAWN, "float32")


def test_an_option_that_a_backend_lacks_is_one_finding() -> None:
    lacks = without("offset", "casting")
    finding = found(lacks, "one_at_a_time")
    assert (finding.verdict, (finding.case or "").split()[2]) == ("fail", "offset=1.0")
    assert finding.message == "raised NotImplementedError: offset: got 1.0\nrefused as well: casting=gemma"
    for name in ("value", "argument_kinds"):
        assert found(lacks, name).verdict == "pass", name
    assert found(lacks, "value").examples == DRAWN.examples  # others were drawn in place of the refused ones


def test_a_default_that_a_backend_lacks_is_one_finding() -> None:
    def of_tanh(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
        if approximate == "none":
            raise NotImplementedError("approximate: got none; allowed: tanh")
        return reference.geglu(gate, up, approximate=approximate)

    finding = found(of_tanh, "one_at_a_time", "geglu")
    assert finding.verdict == "fail"
    assert (finding.message or "").startswith("raised NotImplementedError: approximate: got none; allowed: tanh")
    assert (found(of_tanh, "value", "geglu").verdict, found(of_tanh, "no_grad", "geglu").verdict) == ("pass", "pass")
    wrong = lambda gate, up, *, approximate="none": 2 * of_tanh(gate, up, approximate=approximate)  # noqa: E731
    for name in ("value", "extents"):  # whose cases have no options
        assert "gate G1" in (found(wrong, name, "geglu").message or "")


def test_a_fault_is_found_behind_an_option_that_is_lacking() -> None:
    lacks = without("offset")

    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, **options: Any) -> torch.Tensor:
        return lacks(x, weight, eps, **options) * (2 if options.get("casting") == "gemma" else 1)

    for name in ("value", "one_at_a_time"):
        assert "gate G1" in (found(wrong, name).message or ""), name


def test_a_backend_that_refuses_every_case_does_not_pass() -> None:
    def by_total(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        if options.get("reduction") == "none":
            raise NotImplementedError("no losses of rows")
        return reference.cross_entropy(logits, labels, **options)

    skipped = found(by_total, "row_independence", "cross_entropy")
    why = "the backend lacks an option of every case: raised NotImplementedError: no losses of rows"
    assert (skipped.verdict, skipped.examples, skipped.message) == ("skip", 0, why)


def test_a_call_without_options_that_is_refused_is_a_failure() -> None:
    def nothing(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, **options: Any) -> torch.Tensor:
        raise NotImplementedError("later")

    for name in ("value", "one_at_a_time", "row_independence"):
        finding = found(nothing, name)
        assert (finding.verdict, finding.message) == ("fail", "raised NotImplementedError: later"), name

"""The search: repeated calls on a GPU, which a backend may have recorded, and cases that are not checked."""

import pytest
import torch

from conformance.case import Case
from conformance.gates import Failure, Unchecked
from conformance.profiles import PROFILES
from conformance.property import Property
from conformance.search import reproduce, search
from conformance.specs import specs
from conformance.trial import Trial
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

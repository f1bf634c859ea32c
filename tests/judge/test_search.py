"""On a GPU the search checks each case twice, so that a property also sees calls that a backend has recorded."""

import pytest
import torch

from conformance.case import Case
from conformance.gates import Failure
from conformance.property import Property
from conformance.search import reproduce
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

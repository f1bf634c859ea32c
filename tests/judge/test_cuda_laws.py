"""The laws that take a card fail what is wrong on a card alone, and pass the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.gates import Failure
from conformance.properties import PROPERTIES
from conformance.spec import specs
from conformance.trial import Trial
from unsloth_ref.kernels import swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_the_default_stream(gate: Tensor, up: Tensor) -> Tensor:
    """Whatever stream is current."""
    with torch.cuda.stream(torch.cuda.default_stream()):
        return swiglu(gate, up)


def waits_for_a_number(gate: Tensor, up: Tensor) -> Tensor:
    """Looks at its gate before it starts."""
    if gate.isinf().any().item():
        raise ValueError("gate: got an infinity; allowed: finite numbers")
    return swiglu(gate, up)


LARGEST: list[float] = []


def keeps_a_number(gate: Tensor, up: Tensor) -> Tensor:
    """Divides by the largest gate and multiplies by it as a Python number, which a graph keeps from its capture."""
    largest = gate.detach().abs().max()
    if not torch.cuda.is_current_stream_capturing():
        LARGEST[:] = [largest.item()]
    return swiglu(gate * (LARGEST[0] / largest), up)


LAWS = {
    "side_stream": (on_the_default_stream, "a side stream changes the results"),
    "no_sync": (waits_for_a_number, "called a synchronizing CUDA operation"),
    "cuda_graph": (keeps_a_number, "a replayed CUDA graph differs from a plain call"),
}


def check(law: str, function: Any) -> None:
    spec = specs()["swiglu"]
    PROPERTIES[law].check(Trial(spec, function, torch.float32, "cuda"), spec.case(4, 130))


@pytest.mark.parametrize("law", LAWS)
def test_a_law_fails_what_is_wrong_on_a_card(law: str) -> None:
    function, message = LAWS[law]
    with pytest.raises(Failure, match=message):
        check(law, function)


@pytest.mark.parametrize("law", LAWS)
def test_a_law_passes_the_reference(law: str) -> None:
    check(law, swiglu)

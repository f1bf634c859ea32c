"""The properties that need CUDA fail kernels that are wrong only on CUDA, and pass the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.gates import Failure
from conformance.properties import PROPERTIES
from conformance.specs import specs
from conformance.trial import Trial
from unsloth_ref.kernels import swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_the_default_stream(gate: Tensor, up: Tensor) -> Tensor:
    """Ignores the current stream."""
    with torch.cuda.stream(torch.cuda.default_stream()):
        return swiglu(gate, up)


def synchronises(gate: Tensor, up: Tensor) -> Tensor:
    """Reads a value of its gate before it starts."""
    if gate.isinf().any().item():
        raise ValueError("gate: got an infinity; allowed: finite numbers")
    return swiglu(gate, up)


LARGEST: list[float] = []


def freezes_a_number(gate: Tensor, up: Tensor) -> Tensor:
    """Divides by the largest gate and multiplies by it as a Python number, which a graph freezes at its capture."""
    largest = gate.detach().abs().max()
    if not torch.cuda.is_current_stream_capturing():
        LARGEST[:] = [largest.item()]
    return swiglu(gate * (LARGEST[0] / largest), up)


WRONG = {
    "side_stream": (on_the_default_stream, "a side stream changes the results"),
    "no_sync": (synchronises, "called a synchronizing CUDA operation"),
    "cuda_graph": (freezes_a_number, "a replayed CUDA graph differs from an eager call"),
}


CUDA_ONLY = [name for name, prop in PROPERTIES.items() if "cuda" in prop.needs]


def check(name: str, function: Any) -> None:
    spec = specs()["swiglu"]
    PROPERTIES[name].check(Trial(spec, function, torch.float32, "cuda"), spec.case(4, 130))


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_a_property_fails_a_wrong_kernel(name: str) -> None:
    function, message = WRONG[name]
    with pytest.raises(Failure, match=message):
        check(name, function)


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_a_property_passes_the_reference(name: str) -> None:
    check(name, swiglu)

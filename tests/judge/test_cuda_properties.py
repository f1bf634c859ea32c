"""The properties that need CUDA fail kernels that are wrong only on CUDA, and pass the reference; replayed calls."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.backends import load
from conformance.case import LAYOUTS
from conformance.instruments.memory import fenced
from conformance.profiles import PROFILES
from conformance.properties import PROPERTIES
from conformance.specs import specs
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Trial
from tests.judge import scratch
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


def works_on_a_stream_of_its_own(gate: Tensor, up: Tensor) -> Tensor:
    """Waits for the current stream, which does not wait for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    y = torch.empty_like(gate)
    with torch.cuda.stream(stream):
        return torch.add(swiglu(gate, up), y.zero_())


class _SavesMuch(torch.autograd.Function):
    """The identity, which keeps copies for its backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value.float(), value.double())
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


def saves_much(gate: Tensor, up: Tensor) -> Tensor:
    """Saves wider copies of its output."""
    return _SavesMuch.apply(swiglu(gate, up))  # type: ignore[no-any-return]


def leaves_its_device_current(gate: Tensor, up: Tensor) -> Tensor:
    """Makes the device of its inputs the current one."""
    torch.cuda.set_device(gate.device)
    return swiglu(gate, up)


WRONG = {
    "honest_results": (works_on_a_stream_of_its_own, "was not complete when the call returned"),
    "memory": (saves_much, "memory saved for the backward pass: got"),
    "second_device": (leaves_its_device_current, "a call on cuda:1 left device 1 current; allowed: 0"),
    "side_stream": (on_the_default_stream, "a side stream changes the results"),
    "no_sync": (synchronises, "called a synchronizing CUDA operation"),
    "cuda_graph": (freezes_a_number, "a replayed CUDA graph differs from an eager call"),
}


def check(name: str, function: Any) -> None:
    spec, prop = specs()["swiglu"], PROPERTIES[name]
    trial = Trial(spec, function, torch.float32, "cuda")
    if why := prop.skipped(trial):
        pytest.skip(why)
    case = prop.cases(spec, PROFILES["dev"])[0] if name == "memory" and prop.cases else spec.case(4, 130)
    prop.check(trial, case)


@pytest.mark.parametrize("name", WRONG)
def test_a_property_fails_a_wrong_kernel(name: str) -> None:
    function, message = WRONG[name]
    with pytest.raises(Failure, match=message):
        check(name, function)


@pytest.mark.parametrize("name", WRONG)
def test_a_property_passes_the_reference(name: str) -> None:
    with pytest.raises(Unchecked, match="plain PyTorch") if name == "memory" else nullcontext():
        check(name, swiglu)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_side_stream_reads_inputs_as_the_default_stream_does(layout: str) -> None:
    """The sum of two rows is in one thread where they are aligned, in two where they are not."""
    spec, function = specs()["add_rms_norm"], load("fast", "cuda").functions["add_rms_norm"]
    trial = Trial(spec, function, torch.float32, "cuda")
    PROPERTIES["side_stream"].check(trial, replace(spec.case(2, 1), layout=layout))


def test_every_property_that_needs_cuda_has_a_wrong_kernel() -> None:
    needing = {name for name, prop in PROPERTIES.items() if {"cuda", "two devices"}.intersection(prop.needs)}
    assert needing <= {*WRONG, "fpsan"}  # test_exact.py has that of fpsan


@pytest.mark.parametrize("name", scratch.FAULTS)
def test_a_fault_in_scratch_memory_is_found_in_first_and_in_replayed_calls(name: str) -> None:
    prop, message = scratch.FAULTS[name]
    for _ in range(3):  # the first call is recorded, later ones are replayed
        with pytest.raises(Failure, match=message):
            check(prop, getattr(scratch, name).swiglu)


@pytest.mark.parametrize("name", ["one_past", "half", "tail_of_counters"])
def test_these_faults_are_in_replayed_calls(name: str) -> None:
    gate, up = (torch.randn(4, 130, device="cuda", requires_grad=True) for _ in range(2))
    with fenced("cuda"):
        calls = [getattr(scratch, name).swiglu(gate, up) for _ in range(2)]
    assert all("CppNode" in y.grad_fn.name() for y in calls)


@pytest.mark.parametrize("name", ["value", "guard_writes", "guard_reads", "uninitialised"])
def test_right_scratch_memory_passes(name: str) -> None:
    for _ in range(3):
        check(name, scratch.right.swiglu)


def test_fences_reach_other_streams_threads_and_graphs() -> None:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    x = torch.randn(1000, device="cuda", requires_grad=True)
    with fenced("cuda", 0x7B) as allocations:
        with torch.cuda.stream(stream):
            elsewhere = torch.empty(1000, device="cuda", dtype=torch.uint8)
            kept = (x * 2).sum()
        stream.synchronize()
        kept.backward()  # on autograd's thread
        with torch.cuda.graph(graph):
            captured = torch.empty(1000, device="cuda", dtype=torch.uint8)
            copied = captured.clone()
        graph.replay()
    allocations.demand_unbroken()
    assert (elsewhere == 0x7B).all() and (copied == 0x7B).all() and allocations.count >= 6
    assert torch.equal(x.grad, torch.full_like(x, 2))  # pyright: ignore[reportArgumentType]

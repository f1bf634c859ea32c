"""Fences detect writes outside of tensors, poison reaches every allocation; failures of worker processes."""

import ctypes
import logging
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension
import triton
from torch import Tensor

from conformance.instruments import memory
from conformance.instruments.memory import Allocations, Fence, demand_unbroken
from conformance.properties import PROPERTIES
from conformance.running.runner import Task, next_task, run
from conformance.specs import specs
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial
from tests.judge import scratch
from tests.judge.dying import ILLEGAL
from unsloth_fast.kernels._launch import INTERPRETED

Fenced = Callable[..., Allocations]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int64)


def before_and_after(tensor: Tensor, elements: int) -> Tensor:
    """A view of the same memory that starts this many elements earlier and ends as many later."""
    start = tensor.storage_offset() - elements
    return tensor.as_strided((tensor.numel() + 2 * elements,), (1,), start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("index", "where"), [(0, -3), (-1, 3), (2, -1), (-3, 1)])
def test_a_fence_locates_a_write(dtype: torch.dtype, index: int, where: int) -> None:
    fence = Fence(torch.arange(6).to(dtype))
    assert fence.broken() is None
    before_and_after(fence.tensor, 3)[index] = 0
    assert fence.broken() == where
    side = f"{-where} elements before its start" if where < 0 else f"{where} elements past its end"
    with pytest.raises(Failure, match=f"wrote outside x, {side}"):
        demand_unbroken("x", fence)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_inside_does_not_break_the_fence(dtype: torch.dtype) -> None:
    fence = Fence(torch.zeros(2, 3, dtype=dtype))
    fence.tensor.fill_(1)
    assert fence.broken() is None


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(12.0).view(3, 4).T, torch.arange(4.0).expand(3, 4), torch.empty(0, 4), torch.arange(24.0)[::2]],
    ids=["transposed", "expanded", "empty", "stepped"],
)
def test_a_fence_keeps_values_and_strides(tensor: Tensor) -> None:
    fence = Fence(tensor, 0xFF)
    assert fence.tensor.equal(tensor)
    assert fence.tensor.stride() == tensor.stride()
    assert fence.broken() is None


def of_torch(poison: int = 0xFF, band: int = 0x25) -> Allocations:
    """The context that is used where there is no compiler."""
    return memory._FunctionsOfTorch(poison, band)


def of_device(poison: int = 0xFF, band: int = 0x25) -> Allocations:
    """The context of the compiled allocator."""
    if memory._library("cpu") is None:
        pytest.skip("needs a compiler")
    return memory.fenced("cpu", poison, band)


BOTH = pytest.mark.parametrize("fenced", [of_torch, of_device])


def functions() -> list[object]:
    """The functions that are replaced where there is no compiler."""
    return [getattr(torch, name) for name in memory._FUNCTIONS] + [getattr(Tensor, name) for name in memory._METHODS]


def test_torch_is_restored_after_an_exception() -> None:
    untouched, own = functions(), set(vars(Tensor))
    with pytest.raises(ZeroDivisionError), of_torch():
        assert all(now is not then for now, then in zip(functions(), untouched, strict=True))
        raise ZeroDivisionError
    assert all(now == then for now, then in zip(functions(), untouched, strict=True))
    assert set(vars(Tensor)) == own


@BOTH
@pytest.mark.parametrize("poison", memory.POISONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_only_uninitialised_memory_is_poisoned(fenced: Fenced, poison: int, dtype: torch.dtype) -> None:
    like = torch.ones(2, 3, dtype=dtype)
    with fenced(poison) as allocations:
        empties = [torch.empty(2, 3, dtype=dtype), torch.empty_like(like), like.new_empty(2, 3)]
        zeros = [torch.zeros(2, 3, dtype=dtype), torch.zeros_like(like), like.new_zeros(2, 3)]
    assert all((empty.view(torch.uint8) == poison).all() for empty in empties)
    assert all((zero == 0).all() for zero in zeros)
    assert allocations.count >= 6
    allocations.demand_unbroken()


@BOTH
def test_a_write_past_the_end_of_an_allocation_is_found_after_it_was_freed(fenced: Fenced) -> None:
    with fenced() as allocations:
        tensor = torch.empty(2, 3)
        ctypes.memset(tensor.data_ptr() + tensor.nbytes, 0, 4)
        del tensor
    with pytest.raises(Failure, match=r"wrote outside an allocation of .*, 1 (elements|bytes) past its end"):
        allocations.demand_unbroken()


@BOTH
def test_a_write_before_the_start_of_an_allocation_is_found(fenced: Fenced) -> None:
    with fenced() as allocations:
        tensor = torch.empty(2, 3)
        ctypes.memset(tensor.data_ptr() - 8, 0, 4)
    with pytest.raises(Failure, match=r"wrote outside an allocation of .*, (2 elements|5 bytes) before its start"):
        allocations.demand_unbroken()


def test_tensors_outlive_the_context_in_which_they_were_allocated() -> None:
    with of_device(0x7B):
        tensor = torch.empty(5, dtype=torch.int64)
    with of_device(0x00) as allocations:
        tensor.resize_(2**12).fill_(3)
    assert (tensor == 3).all() and allocations.count == 1
    del tensor
    allocations.demand_unbroken()


def test_each_fault_in_scratch_memory_is_found_by_the_property_that_names_it() -> None:
    of_device()
    spec = specs()["swiglu"]
    for name, (prop, message) in scratch.FAULTS.items():
        with pytest.raises(Failure, match=message):
            PROPERTIES[prop].check(Trial(spec, getattr(scratch, name).swiglu, torch.float32, DEVICE), spec.case(4, 130))
    for prop in ("guard_writes", "guard_reads", "uninitialised"):
        PROPERTIES[prop].check(Trial(spec, scratch.right.swiglu, torch.float32, DEVICE), spec.case(4, 130))


SPEC = specs()["swiglu"]
CASE = SPEC.case(4, 3)


def unaffected(change: Callable[[int, int], float]) -> None:
    """Compare right results, to which the number of the call and the content of memory add something."""
    trial, calls = Trial(SPEC, SPEC.reference, torch.float32, "cpu"), iter(range(100))

    def run(content: int) -> Run:
        right = trial.run(case=CASE)
        return Run((right.outputs[0] + change(next(calls), content),), right.grads)

    memory.demand_unaffected(trial, CASE, run, (1, 0), "memory")


@pytest.mark.parametrize(
    "change",
    [
        lambda call, content: call % 3,
        lambda call, content: 1e-9 * (call % 3 * content),
        lambda call, content: 1e-9 * (call == 1),
    ],
    ids=["always", "for one content, within the gates", "once, within the gates"],
)
def test_results_that_differ_by_themselves_are_not_a_fault_of_memory(change: Callable[[int, int], float]) -> None:
    unaffected(change)


@pytest.mark.parametrize(
    "change",
    [
        lambda call, content: 1e-9 * content,
        lambda call, content: 1e-9 * (call == 0),
        lambda call, content: (call % 3 + 1) * content,
        lambda call, content: call % 3 + (nan if content else 0),
    ],
    ids=["content", "first call", "a race that memory opens", "at random, and NaN"],
)
def test_results_that_depend_on_memory_or_on_the_first_call_are_a_fault(change: Callable[[int, int], float]) -> None:
    with pytest.raises(Failure, match=r"memory: (whether an element is finite: )?output y differs"):
        unaffected(change)


def test_without_a_compiler_the_functions_of_torch_are_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # part of the compiled file's name
    memory._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert isinstance(memory.fenced("cpu"), memory._FunctionsOfTorch)
            assert isinstance(memory.fenced("cpu"), memory._FunctionsOfTorch)
    finally:
        memory._library.cache_clear()
    assert [record.message.count("no-such-compiler") for record in caplog.records] == [1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_allocator_of_cuda_has_the_types_of_this_torch(tmp_path: Path) -> None:
    """A CPU build of torch has all headers except one, which contains only settings."""
    settings = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    settings.parent.mkdir(parents=True)
    settings.touch()
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    include = [f"-I{path}" for path in (*torch.utils.cpp_extension.include_paths(), headers, tmp_path)]
    source = Path(memory.__file__).with_suffix(".cpp")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-DCONFORMANCE_CUDA", *include, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_process_that_dies_is_a_failure_and_the_next_task_runs() -> None:
    aborting = Task("tests.judge.dying.aborting", "swiglu", "value", "float32", "cpu", "ci")
    following = Task("tests.judge.right.swiglu_by_sigmoid", "swiglu", "signature_parity", "float32", "cpu", "ci")
    (_, died), (_, next_one) = run([aborting, following], lambda *_: None, jobs=1)
    assert died.verdict == "fail"
    assert "the process died (SIGABRT)" in (died.message or "")
    assert died.case == "rows=1 hidden=1 fill=randn layout=contiguous seed=0"
    assert next_one.verdict == "pass"


def test_a_failure_that_loses_the_cuda_context_keeps_its_message() -> None:
    losing = Task("tests.judge.dying.losing_the_context", "swiglu", "value", "float32", "cpu", "ci")
    ((_, lost),) = run([losing], lambda *_: None, jobs=1)
    assert lost.verdict == "fail"
    assert ILLEGAL in (lost.message or "")


def test_tasks_that_take_gigabytes_run_one_at_a_time() -> None:
    one, other = (Task("fast", op, "int64_offsets", "float32", "cuda") for op in ("rope", "swiglu"))
    small = replace(one, property="value")
    assert next_task([other, small], []) is other
    assert next_task([other, small], [small]) is other
    assert next_task([other, small], [one]) is small
    assert next_task([other], [small, one]) is None

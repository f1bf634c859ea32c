"""Fences detect writes outside of tensors, and torch's functions are restored; failures of worker processes."""

from dataclasses import replace
from math import nan

import pytest
import torch
from torch import Tensor

from conformance import memory
from conformance.gates import Failure
from conformance.memory import Allocations, Fence, demand_unbroken
from conformance.runner import Task, next_task, run

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
    fence = Fence(tensor, nan)
    assert fence.tensor.equal(tensor)
    assert fence.tensor.stride() == tensor.stride()
    assert fence.broken() is None


def functions() -> list[object]:
    """The functions that Allocations replaces."""
    of_torch = [getattr(torch, name) for name in memory._FUNCTIONS]
    return of_torch + [getattr(Tensor, name) for name in memory._METHODS]


def test_torch_is_restored_after_an_exception() -> None:
    untouched, own = functions(), set(vars(Tensor))
    with pytest.raises(ZeroDivisionError), Allocations():
        assert all(now is not then for now, then in zip(functions(), untouched, strict=True))
        raise ZeroDivisionError
    assert all(now == then for now, then in zip(functions(), untouched, strict=True))
    assert set(vars(Tensor)) == own


@pytest.mark.parametrize("fill", [nan, 1e4])
def test_allocations_fill_only_uninitialised_memory(fill: float) -> None:
    like = torch.ones(2, 3)
    with Allocations(fill) as allocations:
        empties = [torch.empty(2, 3), torch.empty_like(like), like.new_empty(2, 3)]
        zeros = [torch.zeros(2, 3), torch.zeros_like(like), like.new_zeros(2, 3)]
    assert all(torch.full((2, 3), fill).equal(empty) or empty.isnan().all() for empty in empties)
    assert all((zero == 0).all() for zero in zeros)
    allocations.demand_unbroken()


def test_allocations_detect_a_write_past_the_end() -> None:
    with Allocations() as allocations:
        before_and_after(torch.empty(2, 3), 1)[-1] = 0.0
    with pytest.raises(Failure, match=r"an allocated tensor of shape \[2, 3\].*, 1 elements past its end"):
        allocations.demand_unbroken()


def test_a_process_that_dies_is_a_failure_and_the_next_task_runs() -> None:
    tasks = [
        Task(
            f"tests.judge.{backend}",
            "swiglu",
            "signature_parity" if backend.startswith("right") else "value",
            "float32",
            "cpu",
            "ci",
        )
        for backend in ("dying.aborting", "right.swiglu_by_sigmoid")
    ]
    (_, died), (_, next_one) = run(tasks, lambda *_: None, jobs=1)
    assert died.verdict == "fail"
    assert "the process died (SIGABRT)" in (died.message or "")
    assert died.case == "rows=1 hidden=1 fill=randn layout=contiguous seed=0"
    assert next_one.verdict == "pass"


def test_tasks_that_take_gigabytes_run_one_at_a_time() -> None:
    one, other = (Task("fast", op, "int64_offsets", "float32", "cuda") for op in ("rope", "swiglu"))
    small = replace(one, property="value")
    assert next_task([other, small], []) is other
    assert next_task([other, small], [small]) is other
    assert next_task([other, small], [one]) is small
    assert next_task([other], [small, one]) is None

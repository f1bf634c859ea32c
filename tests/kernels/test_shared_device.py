"""The kernel whose programs wait for each other, on a GPU that has no room for all of them."""

import time
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import green_contexts

from tests.kernels.tensors import NO_OPTIONS, random

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@triton.jit
def busy_kernel(y_ptr, steps):
    """Takes all of 1024 threads for as many steps."""
    column = tl.arange(0, 1024)
    y = column.to(tl.float32)
    for _ in range(steps):
        y = y * 0.999 + 1.0
    tl.store(y_ptr + column, y)


def total(logits: Tensor, labels: Tensor, in_place: bool = False) -> tuple[Tensor, ...]:
    module: Any = import_module("unsloth_fast.kernels.cross_entropy")
    options = NO_OPTIONS._replace(label_smoothing=0.1, z_loss=1e-3)
    return module.cross_entropy_total(logits.clone() if in_place else logits, labels, None, options, in_place=in_place)


@cache
def few_processors() -> Any:
    """A context of eight; it stays, because memory that was used in its stream does."""
    return green_contexts.GreenContext.create(num_sms=8)


def inputs(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return random(rows, columns).bfloat16(), torch.arange(rows, device="cuda") * (columns // rows)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("polls", [0, 1, 256])
def test_no_bit_depends_on_how_long_programs_wait(in_place: bool, polls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds with as many segments as the largest vocabularies have."""
    logits, labels = inputs(300, 256_000)
    alone = total(logits, labels)
    monkeypatch.setattr(import_module("unsloth_fast.kernels.cross_entropy"), "POLLS", polls)
    assert all(map(torch.equal, alone, total(logits, labels, in_place)))


def test_rows_on_several_streams_do_not_block_each_other() -> None:
    """Each stream occupies part of the GPU with programs that wait for the rest of their row."""
    logits, labels = inputs(500, 256_000)
    alone = total(logits, labels)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(8):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(total(logits, labels))
    torch.cuda.synchronize()
    for other in found:
        assert all(map(torch.equal, alone, other))


@pytest.mark.parametrize("in_place", [False, True])
def test_it_ends_while_another_kernel_holds_all_but_a_part_of_one_processor(in_place: bool) -> None:
    """The few programs that fit there at the same time are not a whole row."""
    logits, labels = inputs(8, 256_000)
    alone = total(logits, labels, in_place)
    device = torch.cuda.get_device_properties(logits.device)
    programs = device.multi_processor_count * (device.max_threads_per_multi_processor // 1024) - 1
    y, filling, working = torch.empty(1024, device="cuda"), torch.cuda.Stream(), torch.cuda.Stream()
    busy: Any = busy_kernel
    busy[(1,)](y, 10, num_warps=32)
    torch.cuda.synchronize()
    with torch.cuda.stream(filling):
        busy[(programs,)](y, 20_000_000, num_warps=32)  # some tenths of a second
        filled = filling.record_event()
    time.sleep(0.01)
    with torch.cuda.stream(working):
        found = total(logits, labels, in_place)
    working.synchronize()
    assert not filled.query()
    torch.cuda.synchronize()
    assert all(map(torch.equal, alone, found))


@pytest.mark.skipif(
    not (green_contexts.SUPPORTED and hasattr(green_contexts.GreenContext, "Stream")), reason="no green contexts"
)
@pytest.mark.parametrize("in_place", [False, True])
def test_it_ends_in_a_context_of_few_processors(in_place: bool) -> None:
    """They hold fewer programs than a row has segments."""
    logits, labels = inputs(16, 1_000_000)
    alone = total(logits, labels, in_place)
    torch.cuda.synchronize()
    with torch.cuda.stream(few_processors().Stream()):
        found = total(logits, labels, in_place)
    torch.cuda.synchronize()
    assert all(map(torch.equal, alone, found))

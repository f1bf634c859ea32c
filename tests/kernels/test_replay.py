"""Recordings of what a call allocates and launches; test_replayed_calls.py tests their replay."""

import logging
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension
import triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unsloth_fast.kernels import _launch, _replay
from unsloth_fast.kernels._replay import record

COMPILED = SimpleNamespace(
    function=7,
    metadata=SimpleNamespace(num_ctas=1, global_scratch_size=0, num_warps=4, shared=96),
    src=SimpleNamespace(signature={"x": "*fp32", "y": "*fp32", "count": "i32", "one": "constexpr", "eps": "fp32"}),
)
ELSEWHERE = torch.ones(4)
TOOLS = [(-1, 0), (-1, 0)]  # parameters for Triton's own tools


def launch(programs: int, *arguments: object, compiled: object = COMPILED) -> None:
    """A substitute for _launch.launch, which records nothing in the interpreter."""
    if _launch.recorded.launches is not None:
        _launch.recorded.launches.append((compiled, programs, arguments))


class Scaled(torch.autograd.Function):
    """Saves x and an intermediate result, computes a gradient early, and allocates a buffer in each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, scale: float) -> Tensor:
        y, sums, ctx.early = x.new_empty(3, 4), x.new_empty(3), torch.empty_like(x)
        ctx.save_for_backward(x, weight, sums)
        ctx.scale = scale
        launch(5, x, y, -2, 1, scale)
        launch(6, sums.view(3, 1), x.new_empty(8), 3, 1, 0.0)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, sums = ctx.saved_tensors
        early, ctx.early = ctx.early, None
        assert weight is None and ctx.needs_input_grad == (True, False, False)
        dx = torch.empty_like(dy) if early is None else early
        launch(2, sums, dx, 1, 1, ctx.scale)
        return dx, None, None


def unchecked(*arguments: object) -> None:
    """Allows everything."""


def test_a_recording_numbers_inputs_and_then_allocations() -> None:
    found = record(Scaled, unchecked, torch.ones(3, 4, requires_grad=True), None, 0.5)
    assert found is not None
    buffers, launches, results = found.program
    assert [(shape, dtype) for shape, _, dtype in buffers] == [
        ([3, 4], torch.float32),  # y
        ([3], torch.float32),  # sums
        ([3, 4], torch.float32),  # early
        ([8], torch.float32),
    ]
    half = 0x3F00_0000  # 0.5 as a float32
    assert launches == [
        (7, 5, 128, 96, [(0, 0), (1, 0), (-1, 2**64 - 2), (-1, half), *TOOLS]),
        (7, 6, 128, 96, [(2, 0), (4, 0), (-1, 3), (-1, 0), *TOOLS]),
    ]
    assert (results, found.saved, found.early_gradients) == ([1], [0, -1, 2], [3])
    assert found.single and found.inputs == 1 and found.non_differentiable == [] and found.allocated is not None
    assert [list(one.shape) for one in found.allocated] == [shape for shape, *_ in buffers]


def test_the_compiled_code_reads_attributes_that_a_recording_has() -> None:
    found = record(Scaled, unchecked, torch.ones(3, 4, requires_grad=True), None, 0.5)
    source = Path(_replay.__file__).with_suffix(".cpp").read_text()
    names = re.findall(r'(?:attr|python)\("(\w+)"\)', source)
    assert {"program", "early_gradients", "allocated", "backward", "record_backward"} <= set(names)
    assert [name for name in names if not hasattr(found, name)] == []


def test_the_first_backward_pass_takes_an_early_gradient_and_later_ones_allocate_it() -> None:
    found = record(Scaled, unchecked, torch.ones(3, 4, requires_grad=True), None, 0.5)
    assert found is not None
    dy, x, sums, early = (torch.ones(3, 4), torch.ones(3, 4), torch.ones(3), torch.ones(3, 4))
    first = found.record_backward([True], [dy], [x, None, sums], [early])
    assert first is not None and (first[0][0], first[0][2], first[1]) == ([], [4], [])
    second = found.record_backward([True], [dy], [x, None, sums], [])
    assert second is not None
    (buffers, launches, results), allocated = second
    assert [shape for shape, *_ in buffers] == [list(one.shape) for one in allocated] == [[3, 4]] and results == [4]
    assert [number for number, _ in launches[0][4][:2]] == [3, 4]


def test_tensors_with_the_same_address_have_the_same_number() -> None:
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            launch(1, x, other.view(-1), 0, 1, 0.0)
            return x.new_empty(2, 3).transpose(0, 1), other.new_empty(0)

    x = torch.ones(6)
    found = record(Both, unchecked, x, x[:3])
    assert found is not None and found.program[1][0][4][:2] == [(0, 0), (0, 0)]
    assert found.program[0] == [([3, 2], [1, 3], torch.float32), ([0], [1], torch.float32)] and not found.single
    apart = record(Both, unchecked, x, torch.ones(3))
    assert apart is not None and apart.program[1][0][4][:2] == [(0, 0), (1, 0)]


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x + 1,
        lambda x: x.new_empty(4).zero_(),
        lambda x: x.new_empty(4)[:2],  # the kernel may write all of it
        lambda x: (lambda whole: (whole, whole.view(2, 2)))(x.new_empty(4)),
        lambda x: x.view(2, 2),
        lambda x: ELSEWHERE,
        lambda x: launch(1, ELSEWHERE, x, 0, 1, 0.0) or x.new_empty(4),
        lambda x: launch(1, x[1:], x, 0, 1, 0.0) or x.new_empty(4),
        lambda x: launch(
            1, x, x, compiled=SimpleNamespace(src=COMPILED.src, metadata=SimpleNamespace(num_ctas=2))
        ) or x.new_empty(4),
    ],
    ids=["computes", "fills", "part", "twice", "view of input", "not its own", "reads elsewhere", "offset", "cluster"],
)  # fmt: skip
def test_a_call_that_does_more_than_allocate_and_launch_is_not_recorded(body: Callable[[Tensor], Any]) -> None:
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return body(x)

    assert record(Other, unchecked, torch.ones(4)) is None
    assert _launch.recorded.launches is None and not _launch.traced()


def test_tracers_transforms_and_modes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def observe(x: Tensor) -> Tensor:
        seen.append(_replay.watched())
        return x

    assert not _replay.watched()
    torch.jit.trace(observe, torch.ones(2), check_trace=False)
    torch.func.vmap(observe)(torch.ones(2))
    with FlopCounterMode(display=False):
        observe(torch.ones(2))
    monkeypatch.setattr(import_module("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", True)
    observe(torch.ones(2))
    assert seen == [True] * len(seen) and len(seen) >= 4


def test_without_compiled_code_each_call_is_checked_and_executed() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    def check(x: Tensor) -> None:
        if x.ndim > 1:
            raise ValueError("x")

    assert _replay.call_recorded(Same, check, torch.ones(2)).tolist() == [1, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="x"):
            _replay.call_recorded(Same, check, torch.ones(2, 2))


def test_a_machine_that_cannot_compile_logs_it_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise RuntimeError("Ninja is required")

    monkeypatch.setattr(_replay, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.utils.cpp_extension, "load", load)
    _replay._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert _replay._library() is None and _replay._library() is None
    finally:
        _replay._library.cache_clear()
    assert [record.message.count("Ninja is required") for record in caplog.records] == [1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_compiled_code_has_the_types_of_this_torch(tmp_path: Path) -> None:
    """A CPU build of torch has all headers except one, which contains only settings."""
    settings = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    settings.parent.mkdir(parents=True)
    settings.touch()
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    include = [*torch.utils.cpp_extension.include_paths(), sysconfig.get_paths()["include"], headers, tmp_path]
    source = Path(_replay.__file__).with_suffix(".cpp")
    command = [
        "g++",
        "-std=c++20",
        "-fsyntax-only",
        "-DTORCH_EXTENSION_NAME=replay",
        *(f"-I{path}" for path in include),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Recording what a call allocates and launches, and replaying it."""

import logging
import shutil
import subprocess
import sysconfig
import threading
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

from unsloth_fast import kernels as fast
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
    """Stands in for _launch.launch, which records nothing in the interpreter."""
    if _launch.recorded.launches is not None:
        _launch.recorded.launches.append((compiled, programs, arguments))


class Scaled(torch.autograd.Function):
    """Saves x and an intermediate, keeps a gradient, and has a buffer of its own in each pass."""

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


def test_a_recording_numbers_what_is_given_and_then_what_is_allocated() -> None:
    found = record(Scaled, None, torch.ones(3, 4, requires_grad=True), None, 0.5)
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
    assert (results, found.saved, found.kept, found.single, found.inputs) == ([1], [0, -1, 2], [3], True, 1)


def test_what_is_kept_is_handed_out_by_the_first_backward_pass_and_allocated_by_later_ones() -> None:
    found = record(Scaled, None, torch.ones(3, 4, requires_grad=True), None, 0.5)
    assert found is not None
    dy, x, sums, early = (torch.ones(3, 4), torch.ones(3, 4), torch.ones(3), torch.ones(3, 4))
    first = found.record_backward([True], [dy], [x, None, sums], [early])
    assert first is not None and first[0] == [] and first[2] == [4]
    second = found.record_backward([True], [dy], [x, None, sums], [])
    assert second is not None and [shape for shape, *_ in second[0]] == [[3, 4]] and second[2] == [4]
    assert [number for number, _ in second[1][0][4][:2]] == [3, 4]


def test_tensors_that_begin_together_are_one_to_a_kernel() -> None:
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            launch(1, x, other.view(-1), 0, 1, 0.0)
            return x.new_empty(2, 3).transpose(0, 1), other.new_empty(0)

    x = torch.ones(6)
    found = record(Both, None, x, x[:3])
    assert found is not None and found.program[1][0][4][:2] == [(0, 0), (0, 0)]
    assert found.program[0] == [([3, 2], [1, 3], torch.float32), ([0], [1], torch.float32)] and not found.single
    apart = record(Both, None, x, torch.ones(3))
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
def test_what_does_more_than_allocate_and_launch_is_not_recorded(body: Callable[[Tensor], Any]) -> None:
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return body(x)

    assert record(Other, None, torch.ones(4)) is None
    assert _launch.recorded.launches is None and not _launch.traced()


def test_without_compiled_code_each_call_is_checked_and_made() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    def check(x: Tensor) -> None:
        if x.ndim > 1:
            raise ValueError("x")

    assert _replay.apply(Same, check, torch.ones(2)).tolist() == [1, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="x"):
            _replay.apply(Same, check, torch.ones(2, 2))


def test_a_machine_that_cannot_compile_is_told_once(
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
def test_the_compiled_code_agrees_with_this_torch(tmp_path: Path) -> None:
    """Its types; a torch for a CPU has all headers but one, which only has settings."""
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


def random(*shape: int) -> Tensor:
    """bfloat16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def passes(call: Callable[..., Any], inputs: list[Tensor], scale: float) -> list[Tensor]:
    """Results, and gradients twice."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    results = call(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.full_like(one, scale) for one in results]
    first = torch.autograd.grad(results, inputs, grads, retain_graph=True)
    return [*results, *first, *torch.autograd.grad(results, inputs, grads)]


LABELS = [0, 5, -100, 3]
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]]]] = {
    "rms_norm": (fast.rms_norm, lambda: [random(5, 72), random(72)]),
    "add_rms_norm": (fast.add_rms_norm, lambda: [random(5, 72), random(5, 72), random(72)]),
    "layer_norm": (fast.layer_norm, lambda: [random(5, 72), random(72), random(72)]),
    "swiglu": (fast.swiglu, lambda: list(random(5, 144).chunk(2, 1))),
    "geglu": (fast.geglu, lambda: [random(5, 72), random(5, 72)]),
    "rope": (
        lambda q, k: fast.rope(q, k, torch.ones(1, 6, 8, device="cuda"), torch.ones(1, 6, 8, device="cuda")),
        lambda: [random(2, 6, 4, 8).transpose(1, 2), random(2, 2, 6, 8)],
    ),
    "cross_entropy": (
        lambda logits: fast.cross_entropy(logits, torch.tensor(LABELS, device="cuda")),
        lambda: [random(4, 20000)],
    ),
    "losses": (
        lambda logits: fast.cross_entropy(logits, torch.tensor(LABELS, device="cuda"), reduction="none"),
        lambda: [random(4, 64)],
    ),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("name", CALLS)
def test_a_replayed_call_gives_what_the_python_gives(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    call, draw = CALLS[name]
    inputs = draw()
    replayed = [passes(call, inputs, scale) for _ in range(2)]
    for module in ("rms_norm", "add_rms_norm", "layer_norm", "swiglu", "geglu", "rope", "cross_entropy"):
        monkeypatch.setattr(import_module(f"unsloth_fast.kernels.{module}"), "apply", _replay.plain)
    written = passes(call, inputs, scale)
    assert "CppNode" in replayed[0][0].grad_fn.name() and "CppNode" not in written[0].grad_fn.name()  # type: ignore[union-attr]
    for results in replayed:
        for one, other in zip(results, written, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_raises_as_the_python_does() -> None:
    x, weight = random(4, 8).requires_grad_(), random(8).requires_grad_()
    for _ in range(2):
        y = fast.rms_norm(x, weight)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.sum().backward()
        (grad,) = torch.autograd.grad(fast.rms_norm(x, weight).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()
        y = fast.rms_norm(x, weight)
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        with pytest.raises(ValueError, match="eps: got -1"):
            fast.rms_norm(x, weight, -1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_the_python_of_a_backward_pass_raises_arrives() -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.new_empty(x.shape)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            _replay.apply(Raises, None, random(3).requires_grad_()).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hooks_modes_and_fences_see_what_a_replayed_call_does() -> None:
    from conformance.memory import Allocations

    x, weight = random(4, 8).requires_grad_(), random(8)
    expected = fast.rms_norm(x, weight)
    packed: list[Tensor] = []

    def refuse(tensor: Tensor) -> None:
        raise NotImplementedError("not saved")

    with torch.autograd.graph.saved_tensors_hooks(lambda one: packed.append(one) or one, lambda one: one):
        fast.rms_norm(x, weight).sum().backward()
    assert len(packed) == 3
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), pytest.raises(NotImplementedError):
        fast.rms_norm(x, weight)
    with Allocations(float("nan")) as fences:
        assert torch.equal(fast.rms_norm(x, weight), expected)
    assert len(fences._fences) == 2
    assert torch.equal(torch.compile(lambda x: fast.rms_norm(x, weight) * 1, fullgraph=True)(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_run_on_the_stream_and_thread_that_calls() -> None:
    x, weight = random(4, 8).requires_grad_(), random(8)
    expected = torch.autograd.grad(fast.rms_norm(x, weight).sum(), x)[0]
    found: list[Tensor] = []

    def other() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.extend(torch.autograd.grad(fast.rms_norm(x, weight).sum(), x))
        stream.synchronize()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)

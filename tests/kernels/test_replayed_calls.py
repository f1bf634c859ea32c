"""Calls that compiled code replays, on a GPU, compared with the same calls in Python."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.spec import Spec
from tests.operations.calls import CALLS, call_of
from unsloth_fast import kernels as fast
from unsloth_fast.kernels import _launch, _replay

rms_norm, swiglu = (import_module(f"unsloth_fast.kernels.{name}") for name in ("rms_norm", "swiglu"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def random(*shape: int) -> Tensor:
    """bfloat16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def unchecked(*arguments: object) -> None:
    """Allows everything."""


def passes(call: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], scale: float) -> list[Tensor]:
    """Results, and gradients twice."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    results = call(fast, *inputs)
    grads = [torch.full_like(one, scale) for one in results]
    first = torch.autograd.grad(results, inputs, grads, retain_graph=True)
    return [*results, *first, *torch.autograd.grad(results, inputs, grads)]


RECORDED = [
    (spec, options)
    for spec, options in CALLS
    if hasattr(import_module(f"unsloth_fast.kernels.{spec.op}"), "call_recorded")
]
COLUMNS = {"cross_entropy": 20000}  # several segments; of other operations 72


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(("spec", "options"), RECORDED, ids=[f"{spec.op} {len(options)}" for spec, options in RECORDED])
def test_a_replayed_call_gives_the_results_of_the_python_code(
    spec: Spec, options: dict[str, Any], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, inputs = call_of(spec, 5, COLUMNS.get(spec.op, 72), options, torch.bfloat16)
    replayed = [passes(call, inputs, scale) for _ in range(2)]
    monkeypatch.setattr(import_module(f"unsloth_fast.kernels.{spec.op}"), "call_recorded", _replay.call)
    expected = passes(call, inputs, scale)
    assert "CppNode" in replayed[0][0].grad_fn.name() and "CppNode" not in expected[0].grad_fn.name()  # type: ignore[union-attr]
    for results in replayed:
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()


def test_every_layout_of_incoming_gradients() -> None:
    x, weight = random(5, 72), random(72)
    layouts = {
        "expanded": lambda dy: dy[:1].expand_as(dy),
        "transposed": lambda dy: dy.t().contiguous().t(),
        "one off": lambda dy: torch.cat((dy.flatten()[:1], dy.flatten()))[1:].view_as(dy),
        "negated": lambda dy: torch._neg_view(dy),
        "contiguous": lambda dy: dy,
    }
    for layout in layouts.values():
        given = layout(random(5, 72))
        replayed = [torch.autograd.grad(fast.rms_norm(x.requires_grad_(), weight), x, given)[0] for _ in range(3)]
        in_python = _replay.call(rms_norm._RMSNorm, unchecked, x, weight, 1e-6, 0.0, "llama")
        expected = torch.autograd.grad(in_python, x, given.resolve_neg())[0]
        assert all(torch.equal(one, expected) for one in replayed)


def test_a_new_signature_in_a_graph_capture_is_launched_once() -> None:
    x, weight = random(7, 40).requires_grad_(), random(40)

    def both() -> tuple[Tensor, Tensor]:
        y = fast.rms_norm(x, weight)
        return y, torch.autograd.grad(y.sum(), x)[0]

    graph, profiler = torch.cuda.CUDAGraph(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    fast.rms_norm(random(8, 40).requires_grad_(), weight).sum().backward()  # compiles
    with torch.cuda.graph(graph):
        found = both()
    with profiler:
        graph.replay()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if "rms_norm" in event.name]
    assert len(names) == len(set(names)) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, both(), strict=True))


def test_a_mode_around_the_backward_pass_alone_sees_it() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    x = random(6, 24).requires_grad_()
    for _ in range(2):
        names: set[str] = set()
        y = fast.rms_norm(x, random(24)).sum()
        with Names():
            y.backward()
        assert "unsloth_fast::rms_norm_backward" in names


def test_threads_that_compile_the_same_kernel_at_once() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            return swiglu.Gated.forward(ctx, gate, up, "silu")

    inputs = [(random(rows, 1000), random(rows, 1000)) for rows in range(1, 9)]
    _launch._compiled.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: _replay.call_recorded(Same, unchecked, *pair), inputs))
    gc.collect()
    for gate, up in inputs:
        expected = _replay.call(Same, unchecked, gate, up)
        assert torch.equal(_replay.call_recorded(Same, unchecked, gate, up), expected)


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


def test_an_error_in_the_python_of_a_backward_pass_reaches_the_caller() -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.new_empty(x.shape)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            _replay.call_recorded(Raises, unchecked, random(3).requires_grad_()).sum().backward()


def test_hooks_modes_and_fences_see_what_a_replayed_call_does() -> None:
    from conformance.instruments.memory import fenced

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
    with fenced("cuda") as allocations:
        replayed = fast.rms_norm(x, weight)
    assert "CppNode" in replayed.grad_fn.name() and torch.equal(replayed, expected)  # type: ignore[union-attr]
    assert allocations.count == 2
    assert torch.equal(torch.compile(lambda x: fast.rms_norm(x, weight) * 1, fullgraph=True)(x), expected)


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

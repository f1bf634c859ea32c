"""Backends that earn a good verdict or a good time without doing the work: the known cheats of kernel leaderboards.

Collected from what KernelBench, robust-kbench, SOL-ExecBench, KernelGuard and the reports about generated CUDA kernels
describe. Each is a backend, such as `tests.judge.cheats.swiglu_is_lazy`.
"""

import threading
import time
from typing import Any

import torch
from torch import Tensor

from tests.judge.contract import wrong
from unsloth_ref import kernels as reference
from unsloth_ref.kernels import swiglu


@wrong("swiglu", "value")
def swiglu_returns_zeros(gate: Tensor, up: Tensor) -> Tensor:
    """Hopes for small outputs and an absolute tolerance."""
    return gate * 0 * up


@wrong("swiglu", "metadata", "value")
def swiglu_returns_its_input(gate: Tensor, up: Tensor) -> Tensor:
    """Does nothing."""
    return gate


@wrong("rms_norm", "value", "one_at_a_time")
def rms_norm_knows_the_distribution(x: Tensor, weight: Tensor, eps: float = 1e-6, **options: Any) -> Tensor:
    """Leaves out the mean square, which is 1 for standard normal inputs."""
    return x * (weight + options.get("offset", 0.0))


@wrong("swiglu", "uninitialised", "value")
def swiglu_returns_old_memory(gate: Tensor, up: Tensor) -> Tensor:
    """Frees a result and returns memory of its size, where the judge's own result may have been."""
    y = torch.empty_like(gate)
    return y + 0 * gate * up


@wrong("swiglu", "value")
def swiglu_computes_in_16_bits(gate: Tensor, up: Tensor) -> Tensor:
    """Computes in fewer bits than it was given."""
    return swiglu(gate.bfloat16(), up.bfloat16()).to(gate.dtype)


@wrong("linear_cross_entropy", "gradients")
def linear_cross_entropy_skips_the_backward_pass(
    hidden: Tensor, weight: Tensor, *others: Any, **options: Any
) -> Tensor:
    """Returns gradients of zeros."""
    loss = reference.linear_cross_entropy(hidden.detach(), weight.detach(), *others, **options)
    return loss + 0 * hidden.sum().float() + 0 * weight.sum().float()


@wrong("swiglu", "inputs_untouched")
def swiglu_clears_its_inputs(gate: Tensor, up: Tensor) -> Tensor:
    """Zeroes the inputs, so that a reference that runs later returns zeros too."""
    y = swiglu(gate.clone(), up.clone())
    gate.data.zero_()
    return y


class _Keeping:
    """Results by a key."""

    def __init__(self) -> None:
        self.results: dict[Any, Tensor] = {}

    def __call__(self, key: Any, gate: Tensor, up: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return swiglu(gate, up)
        y = swiglu(gate, up)
        kept = self.results.setdefault(key, y.detach().clone())
        return y + (kept - y).detach()


BY_SHAPE, BY_ADDRESS = _Keeping(), _Keeping()


@wrong("swiglu", "changed_inputs")
def swiglu_keeps_results_by_shape(gate: Tensor, up: Tensor) -> Tensor:
    """Returns the first result for a shape."""
    return BY_SHAPE((gate.shape, gate.dtype), gate, up)


@wrong("swiglu", "changed_inputs")
def swiglu_keeps_results_by_address(gate: Tensor, up: Tensor) -> Tensor:
    """Returns the first result for an address and a version."""
    return BY_ADDRESS((id(gate), gate.data_ptr(), gate._version, up.data_ptr(), up._version), gate, up)


class _Lazy(Tensor):
    """Computes its elements when something asks for them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@wrong("swiglu", "honest_results")
def swiglu_is_lazy(gate: Tensor, up: Tensor) -> Tensor:
    """Returns a subclass that could do the work after the timer has stopped."""
    return swiglu(gate, up) if torch.compiler.is_compiling() else swiglu(gate, up).as_subclass(_Lazy)


@wrong("swiglu", "honest_results")
def swiglu_leaves_the_work_to_a_thread(gate: Tensor, up: Tensor) -> Tensor:
    """Returns at once, while a thread fills the result."""
    y = swiglu(gate, up)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return y
    wanted = y.detach().clone()
    y.detach().zero_()

    def fill() -> None:
        time.sleep(0.02)
        y.detach().copy_(wanted)

    threading.Thread(target=fill).start()
    return y


@wrong("swiglu", "process_state")
def swiglu_replaces_the_comparison(gate: Tensor, up: Tensor) -> Tensor:
    """Makes every comparison of torch succeed."""
    torch.allclose = lambda *tensors, **tolerances: True
    return swiglu(gate, up)


@wrong("swiglu", "process_state")
def swiglu_replaces_the_timer(gate: Tensor, up: Tensor) -> Tensor:
    """Reports that every call takes no time."""
    torch.cuda.Event.elapsed_time = lambda start, stop: 1e-6  # type: ignore[method-assign]
    time.perf_counter = lambda: 0.0
    return swiglu(gate, up)


class _EqualToAll(Tensor):
    """Equal to every other tensor."""

    def __eq__(self, other: object) -> Any:
        return torch.ones(self.shape, dtype=torch.bool)


@wrong("swiglu", "honest_results")
def swiglu_is_equal_to_everything(gate: Tensor, up: Tensor) -> Tensor:
    """Returns a subclass that answers comparisons itself."""
    return swiglu(gate, up) if torch.compiler.is_compiling() else swiglu(gate, up).as_subclass(_EqualToAll)

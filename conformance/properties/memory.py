"""Memory beside inputs, outputs and gradients is at most what the spec declares: working memory, and what is saved.

The allocator counts: the peak of each pass, and what is left between them. What records only PyTorch's own autograd
nodes is plain PyTorch, which saves what its formulas need, and is not checked.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from conformance.case import Case
from conformance.instruments.plain import is_plain
from conformance.profiles import Profile
from conformance.property import Property, of_file
from conformance.spec import Spec, nbytes
from conformance.tolerances.gates import Failure, Unchecked
from conformance.trial import Trial, as_leaves

MEBIBYTE = 2**20


def cases(spec: Spec, profile: Profile) -> list[Case]:
    """The spec's case, large enough that a tensor too many is far beyond what is allowed."""
    return [spec.memory.case] if spec.memory is not None else []


def check(trial: Trial, case: Case) -> None:
    """Measure both passes, after a first call that compiles."""
    memory = trial.spec.memory
    assert memory is not None
    trial = replace(trial, source=trial.device)  # a CPU takes seconds to draw so many elements
    inputs = as_leaves(trial.inputs(case), memory.grads)
    options = trial.options(case)
    outputs = trial.call(inputs, options)
    if is_plain(outputs):
        raise Unchecked("plain PyTorch, which saves what its formulas need")
    grad_outputs = trial.grad_outputs(case, outputs)
    trial.backward(outputs, inputs, memory.grads, grad_outputs)
    del outputs
    for name in memory.grads:
        inputs[name].grad = None
    kept: list[Any] = []
    forward, saved = _peak(lambda: kept.append(trial.call(inputs, options)))
    outputs = kept[0]
    of_outputs, of_grads = nbytes(*outputs), sum(nbytes(inputs[name]) for name in memory.grads)
    backward, _ = _peak(lambda: kept.append(trial.backward(outputs, inputs, memory.grads, grad_outputs)))
    allowed_saved, allowed_working = memory.saved(inputs), memory.working(inputs)
    found = {
        "saved for the backward pass": (saved - of_outputs, allowed_saved),
        "at the peak of the forward pass": (forward - of_outputs, allowed_saved + allowed_working),
        "at the peak of the backward pass": (backward - of_grads, allowed_working),
    }
    for what, (measured, allowed) in found.items():
        if measured > allowed + MEBIBYTE:  # for counters and sums of any size of kernel
            raise Failure(
                f"memory {what}: got {measured / MEBIBYTE:.1f} MiB beside inputs, outputs and gradients;"
                f" allowed: {allowed / MEBIBYTE + 1:.1f} MiB"
            )


def _peak(call: Callable[[], Any]) -> tuple[int, int]:
    """Requested bytes above those before the call: at the peak, and at its end."""
    torch.cuda.synchronize()
    before = _requested("current")
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return _requested("peak") - before, _requested("current") - before


def _requested(which: str) -> int:
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


PROPERTY = Property(*of_file(check), cases=cases, needs=("cuda", "gigabytes"))

"""A call returns plain tensors that hold their results: no lazy subclass, no work left to a thread or another stream.

A result is a `torch.Tensor`, or a `torch.nn.Parameter`, with memory of its own for every element. What runs later would
be neither timed nor ordered before what a user does next.
"""

import threading

import torch
from torch import Tensor
from torch.nn import Parameter

from conformance.case import Case
from conformance.property import Property, of_file
from conformance.spec import Inputs
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, as_leaves, bits, detached

WAIT_CYCLES = 20_000_000  # about 10 ms
WAIT_SECONDS = 2.0  # for a thread; a result that comes later was not there either


def check(trial: Trial, case: Case) -> None:
    """Look at the results at once, and again when everything else has ended."""
    demand_honest(trial, case, trial.inputs(case))


def demand_honest(trial: Trial, case: Case, inputs: Inputs) -> None:
    """Raise Failure unless the results of both passes are plain tensors and complete when the passes return."""
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, grads=()).outputs)  # also compiles
    leaves = as_leaves(inputs, trial.spec.grads)
    with _Pass(trial) as forward:
        outputs = trial.call(leaves, trial.options(case))
        forward.returned(Run(outputs, {}))
    with _Pass(trial) as backward:
        grads = trial.backward(outputs, leaves, trial.spec.grads, grad_outputs)
        backward.returned(Run(detached(outputs), grads))


class _Pass:
    """Copies the results of a pass at once, and compares them with what they are when everything else has ended."""

    def __init__(self, trial: Trial) -> None:
        self._trial, self._seen = trial, list[tuple[str, Tensor, Tensor]]()

    def __enter__(self) -> "_Pass":
        self._threads = set(threading.enumerate())
        if self._trial.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(WAIT_CYCLES)  # work on another stream, even if it waits for this one, is now behind
        return self

    def returned(self, run: Run) -> None:
        """Copy on the current stream, without waiting for the device."""
        demand_plain(self._trial, run)
        self._seen = [(name, tensor, bits(tensor).clone()) for _, name, tensor in run.named(self._trial.spec)]

    def __exit__(self, *error: object) -> None:
        left = [thread for thread in threading.enumerate() if thread not in self._threads]
        for thread in left:
            thread.join(WAIT_SECONDS / len(left))
        if self._trial.device == "cuda":
            torch.cuda.synchronize()
        for name, tensor, then in self._seen:
            if not torch.equal(then, bits(tensor)):
                raise Failure(f"{name} was not complete when the call returned: it changed afterwards")


def demand_plain(trial: Trial, run: Run) -> None:
    """Raise Failure unless every result is a plain tensor in memory."""
    for _, name, tensor in run.named(trial.spec):
        if type(tensor) not in (Tensor, Parameter):
            raise Failure(f"{name} is a {type(tensor).__module__}.{type(tensor).__name__}; allowed: torch.Tensor")
        if tensor.layout != torch.strided or tensor._is_zerotensor() or tensor.is_neg() or tensor.is_conj():
            raise Failure(f"{name} is a view that computes its elements later; allowed: elements in memory")
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + elements) * tensor.element_size() if tensor.numel() else 0
        if tensor.untyped_storage().nbytes() < needed or (needed and tensor.untyped_storage().data_ptr() == 0):
            held = tensor.untyped_storage().nbytes()
            raise Failure(f"{name} has no memory for its elements: got {held} bytes; needed: {needed}")


PROPERTY = Property(*of_file(check), share=0.2)

"""One backend on one shape: judged on the inputs that are timed, and again on the last timed results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from conformance import calling
from conformance.case import Case
from conformance.properties import honest_results, process_state
from conformance.spec import Inputs
from conformance.tolerances.gates import Failure
from conformance.trial import Caught, Run, Trial, as_leaves, bits, describe, detached


@dataclass(frozen=True)
class _Set:
    """Tensors in memory of their own, and the calls that use them."""

    inputs: Inputs
    leaves: Inputs
    wanted: list[Tensor]
    grad_outputs: list[Tensor]
    forward: Callable[[], Any]
    forward_of_leaves: Callable[[], Any]


class Contender:
    """Judged on construction; after `prepare` it can be timed.

    Attributes:
        error_use: fraction of the error budget used, if the result is correct.
        failure: what is wrong with its result, or why it cannot be timed.
        cheat: what makes its times meaningless, even those of other people's kernels; see `conformance.properties`'
            honest_results, process_state and changed_inputs.
        remark: which inputs it overwrites. If it does, its last timed result cannot be checked, because its inputs
            have changed.
        usable: whether it returned outputs.
    """

    def __init__(self, trial: Trial, case: Case, inputs: Inputs, ours: bool) -> None:
        """Judge it; one of our own backends fails if it overwrites an input."""
        self.error_use: float | None = None
        self.failure: str | None = None
        self.cheat: str | None = None
        self.remark: str | None = None
        self.usable = False
        self._trial, self._case, self._inputs, self._options = trial, case, inputs, trial.options(case)
        self._grads = [name for name in trial.spec.grads if name in inputs]
        self._judged: Run | None = None
        self._complete = False  # whether both passes returned results
        try:
            self._judge()
        except Failure as failure:
            self.failure = str(failure).split("\n")[0]
        if ours and self.remark and not self.failure:
            self.failure = self.remark
        if self._complete:
            self._demand(lambda: honest_results.demand_honest(trial, case, copies(inputs)))
            self._demand(lambda: process_state.demand_originals(process_state.TIMERS))

    def _demand(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Failure as failure:
            self.cheat = self.cheat or str(failure).split("\n")[0]

    def _judge(self) -> None:
        trial, case = self._trial, self._case
        with torch.no_grad():
            outputs = trial.call(copies(self._inputs), self._options)
        self._grad_outputs = trial.grad_outputs(case, outputs)
        self.usable = True
        own, grad_outputs = copies(self._inputs), [gradient.clone() for gradient in self._grad_outputs]
        run = trial.run(case, own, grad_outputs=grad_outputs)
        self._complete = True
        before = {**self._inputs, **_named(self._grad_outputs)}
        over = [n for n, tensor in {**own, **_named(grad_outputs)}.items() if not same_bits(tensor, before[n])]
        self.remark = f"writes over {' and '.join(over)}" if over else None
        self.error_use = trial.judge(case, run, self._inputs, self._grad_outputs)
        self._judged = run

    def prepare(self, sets: int) -> None:
        """Make this many sets of inputs, which calls use in turn, and run every pass to compile it."""
        self._sets: list[_Set] = []
        with Caught() as caught:
            for _ in range(sets):
                inputs = copies(self._inputs)
                leaves = as_leaves(inputs, self._grads)
                wanted = [leaves[name] for name in self._grads]
                grad_outputs = [gradient.clone() for gradient in self._grad_outputs]
                calls = self._bound(inputs), self._bound(leaves)
                self._sets.append(_Set(inputs, leaves, wanted, grad_outputs, *calls))
            self._turn = cycle(self._sets)
            for call in (self.forward, self.full, self.full):
                call()
        if caught.error is not None:
            self._sets.clear()
            self.usable = False
            self.failure = self.failure or f"raised {describe(caught.error)}"

    def _bound(self, inputs: Inputs) -> Callable[[], Any]:
        """The call with these inputs; a timed call binds nothing."""
        positional, by_name = calling.placed(self._trial.spec.reference, self._trial.spec.arguments(inputs))
        return partial(self._trial.function, *positional, **by_name, **self._options)

    def forward(self) -> Any:
        """Run the forward pass on the next set."""
        one = next(self._turn)
        with torch.no_grad():
            return one.forward()

    def full(self) -> tuple[Any, Sequence[Tensor | None]]:
        """Run the forward pass and compute all gradients on the next set."""
        one = next(self._turn)
        outputs = one.forward_of_leaves()
        return outputs, _gradients(outputs, one)

    def every_forward(self) -> list[Any]:
        """Run the forward pass on every set; all results are kept, so that each has its own memory."""
        with torch.no_grad():
            return [one.forward() for one in self._sets]

    def every_full(self) -> list[tuple[Any, Sequence[Tensor | None]]]:
        """Run the forward pass on every set, then compute all gradients, so that none has its inputs in the cache."""
        outputs = [one.forward_of_leaves() for one in self._sets]
        return [(output, _gradients(output, one)) for output, one in zip(outputs, self._sets, strict=True)]

    def compare(self, what: str, outputs: Any, gradients: Sequence[Tensor | None] = ()) -> None:
        """Compare a timed result with the judged one, if that was correct and its inputs have not changed.

        Results with equal bits are correct. Others, from a contender that is not deterministic, are judged again.
        """
        if self._judged is None or self.failure or self.remark:
            return
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = Run(tuple(output.detach() for output in outputs), {})
        for name, gradient in zip(self._grads, gradients, strict=False):
            if gradient is None:
                self.failure = f"{what}: gradient of {name} is missing (None)"
                return
            found.grads[name] = gradient
        pairs = zip(found.named(self._trial.spec), self._judged.named(self._trial.spec), strict=False)
        if all(same_bits(one, other) for (_, _, one), (_, _, other) in pairs):
            return
        try:
            self._trial.judge(self._case, found, self._inputs, self._grad_outputs)
        except Failure as failure:
            self.failure = f"{what}: {str(failure).splitlines()[0]}"

    def check_times(self) -> None:
        """Find what would explain times without work: call again on timed inputs that have changed in place.

        A result that is kept for an address, or for a shape, is then that of the old elements.
        """
        self._demand(lambda: process_state.demand_originals(process_state.TIMERS))
        if not (self.remark or self.failure):
            self._demand(self._demand_fresh)

    def _demand_fresh(self) -> None:
        first = self._sets[0]
        for tensor in first.leaves.values():
            if tensor.is_floating_point():
                tensor.data.copy_(tensor.data.flip(0))  # the tensor's version stays
        outputs = first.forward_of_leaves()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = _gradients(outputs, first)
        seen = Run(outputs, dict(zip(self._grads, gradients, strict=True)))
        honest_results.demand_plain(self._trial, seen)
        changed = {name: tensor.clone() for name, tensor in first.inputs.items()}
        try:
            self._trial.judge(self._case, Run(detached(outputs), seen.grads), changed, first.grad_outputs)
        except Failure as failure:
            raise Failure(f"after the timed inputs have changed in place: {failure}") from failure

    def replay_over_nan(self, graph: Callable[[], Any], results: Any) -> None:
        """Fill the results with NaN and replay the graph, so that only results it writes can be correct."""
        inputs_at = {
            tensor.untyped_storage().data_ptr()
            for one in self._sets
            for tensor in (*one.inputs.values(), *one.grad_outputs)
        }
        for tensor in _tensors(results):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in inputs_at:
                tensor.detach().fill_(float("nan"))
        graph()


def _gradients(outputs: Any, one: _Set) -> Sequence[Any]:
    """Those of the inputs of a set; none of an operation that has none."""
    return torch.autograd.grad(outputs, one.wanted, one.grad_outputs, allow_unused=True) if one.wanted else ()


def copies(inputs: Inputs) -> Inputs:
    """Copies for a contender, which may overwrite them."""
    return {name: tensor.clone() for name, tensor in inputs.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in every bit."""
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(bits(one), bits(other)))


def _tensors(results: Any) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, tuple | list):
        for result in results:
            yield from _tensors(result)


def _named(grad_outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"grad_output {index}": gradient for index, gradient in enumerate(grad_outputs)}

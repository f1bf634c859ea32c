"""One backend on one shape: judged on the very inputs that are timed, and again after the clock has stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from conformance.case import Case
from conformance.gates import Failure
from conformance.spec import Inputs
from conformance.trial import Raised, Run, Trial, bits, describe, leaf


class Contender:
    """Judged when made; after `prepare` it can be timed.

    Attributes:
        error_use: share of the error budget used, where the result is right.
        red: what is wrong with its result, or that it cannot be timed.
        note: what it writes over; then its last timed result tells nothing, for its inputs are no longer the judged.
        runs: whether it gave outputs at all.
    """

    def __init__(self, trial: Trial, case: Case, inputs: Inputs, ours: bool) -> None:
        """Judge it; one of ours that writes over anything is red."""
        self.error_use: float | None = None
        self.red: str | None = None
        self.note: str | None = None
        self.runs = False
        self._trial, self._case, self._inputs, self._options = trial, case, inputs, trial.options(case)
        self._grads = [name for name in trial.spec.grads if name in inputs]
        self._judged: Run | None = None
        try:
            self._judge()
        except Failure as failure:
            self.red = str(failure).split("\n")[0]
        if ours and self.note and not self.red:
            self.red = self.note

    def _judge(self) -> None:
        trial, case = self._trial, self._case
        with torch.no_grad():
            outputs = trial.call(copies(self._inputs), self._options)
        self._grad_outputs = trial.grad_outputs(case, outputs)
        self.runs = True
        mine, grad_outputs = copies(self._inputs), [gradient.clone() for gradient in self._grad_outputs]
        run = trial.run(case, mine, grad_outputs=grad_outputs)
        before = {**self._inputs, **_named(self._grad_outputs)}
        over = [n for n, tensor in {**mine, **_named(grad_outputs)}.items() if not same_bits(tensor, before[n])]
        self.note = f"writes over {' and '.join(over)}" if over else None
        self.error_use = trial.judge(case, run, self._inputs, self._grad_outputs)
        self._judged = run

    def prepare(self, sets: int) -> None:
        """Make this many sets of inputs, which calls take in turn, and call once, so that everything is compiled."""
        self._sets: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor], list[Tensor]]] = []
        with Raised() as raised:
            for _ in range(sets):
                plain = copies(self._inputs)
                leaves = {name: leaf(tensor, name in self._grads) for name, tensor in plain.items()}
                wanted = [leaves[name] for name in self._grads]
                grad_outputs = [gradient.clone() for gradient in self._grad_outputs]
                self._sets.append((tuple(plain.values()), tuple(leaves.values()), wanted, grad_outputs))
            self._turn = cycle(self._sets)
            for call in (self.forward, self.full, self.full):
                call()
        if raised.error is not None:
            self._sets.clear()
            self.runs = False
            self.red = self.red or f"raised {describe(raised.error)}"

    def forward(self) -> Any:
        """The forward pass alone, on the next set."""
        plain, _, _, _ = next(self._turn)
        with torch.no_grad():
            return self._trial.function(*plain, **self._options)

    def full(self) -> tuple[Any, Sequence[Tensor | None]]:
        """Forward pass and all gradients, on the next set."""
        _, leaves, wanted, grad_outputs = next(self._turn)
        outputs = self._trial.function(*leaves, **self._options)
        return outputs, torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)

    def every_forward(self) -> list[Any]:
        """The forward pass alone, on every set; all results are kept, so that each has memory of its own."""
        with torch.no_grad():
            return [self._trial.function(*plain, **self._options) for plain, _, _, _ in self._sets]

    def every_full(self) -> list[tuple[Any, Sequence[Tensor | None]]]:
        """First the forward pass on every set, then all gradients, so that none finds its inputs in the cache."""
        outputs = [self._trial.function(*leaves, **self._options) for _, leaves, _, _ in self._sets]
        return [
            (output, torch.autograd.grad(output, wanted, grad_outputs, allow_unused=True))
            for output, (_, _, wanted, grad_outputs) in zip(outputs, self._sets, strict=True)
        ]

    def check(self, what: str, outputs: Any, gradients: Sequence[Tensor | None] = ()) -> None:
        """Hold a timed result against the judged one, where that was right and still has the same inputs.

        Equal bits are right; others, of a contender that does not repeat itself, are judged again.
        """
        if self._judged is None or self.red or self.note:
            return
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = Run(tuple(output.detach() for output in outputs), {})
        for name, gradient in zip(self._grads, gradients, strict=False):
            if gradient is None:
                self.red = f"{what}: gradient of {name} is missing (None)"
                return
            found.grads[name] = gradient
        pairs = zip(found.named(self._trial.spec), self._judged.named(self._trial.spec), strict=False)
        if all(same_bits(one, other) for (_, _, one), (_, _, other) in pairs):
            return
        try:
            self._trial.judge(self._case, found, self._inputs, self._grad_outputs)
        except Failure as failure:
            self.red = f"{what}: {str(failure).splitlines()[0]}"

    def replay(self, graph: Callable[[], Any], results: Any) -> None:
        """Replay once more over NaN, so that only what the replay writes can be right."""
        held = {
            tensor.untyped_storage().data_ptr()
            for plain, _, _, grad_outputs in self._sets
            for tensor in (*plain, *grad_outputs)
        }
        for tensor in _tensors(results):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in held:
                tensor.detach().fill_(float("nan"))
        graph()


def copies(inputs: Inputs) -> Inputs:
    """Copies, for a contender that may write over them."""
    return {name: tensor.clone() for name, tensor in inputs.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, NaN and signs of zero included."""
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(bits(one), bits(other)))


def _tensors(results: Any) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, tuple | list):
        for result in results:
            yield from _tensors(result)


def _named(grad_outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"grad_output {index}": gradient for index, gradient in enumerate(grad_outputs)}

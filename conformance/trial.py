"""One operation of one backend, in one dtype on one device: the object that a property works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from conformance import calling
from conformance.case import Case, Draw
from conformance.interpreter import Interpreted
from conformance.profiles import Profile
from conformance.spec import Call, Inputs, Options, Spec, accepted_options
from conformance.tolerances import condition
from conformance.tolerances.gates import ErrorModel, Failure, Unchecked, judge
from conformance.tolerances.integers import judge_exact
from unsloth_ref.accuracy import is_float, widen
from unsloth_ref.checks import counted

Function = Callable[..., Any]


@dataclass(frozen=True)
class Run:
    """The results of one call.

    Attributes:
        outputs: one per output of the spec.
        grads: the gradients of the requested inputs.
        forward_interpreted, backward_interpreted: whether Triton's interpreter ran a kernel in the pass.
    """

    outputs: tuple[Tensor, ...]
    grads: dict[str, Tensor]
    forward_interpreted: bool = False
    backward_interpreted: bool = False

    def named(self, spec: Spec) -> list[tuple[str, str, Tensor]]:
        """(key in the spec, name for messages, tensor) of every output and gradient."""
        outputs = [(name, f"output {name}", value) for name, value in zip(spec.outputs, self.outputs, strict=True)]
        return outputs + [(name, f"gradient of {name}", value) for name, value in self.grads.items()]

    def interpreted(self) -> list[bool]:
        """Whether kernels that Triton's interpreter ran went into each of `named`; gradients depend on both passes."""
        both = self.forward_interpreted or self.backward_interpreted
        return [self.forward_interpreted] * len(self.outputs) + [both] * len(self.grads)


class BackendError(Exception):
    """A backend cannot be judged; the message states the reason in one line."""


class Lacking(Failure):
    """A call raised NotImplementedError, for an option or for an argument of several tensors: the backend lacks it."""


class Refused(Failure):
    """A call raised with a number that the judge added to those of an example, which a backend may refuse."""


class Caught:
    """Catches what judged code raises: for the judge that is a finding, not an error of its own."""

    def __init__(self, *others: type[BaseException]) -> None:
        """Catch Exception and these other types."""
        self._types = (Exception, *others)
        self.error: BaseException | None = None

    def __enter__(self) -> Caught:
        """Return this object, whose `error` is set on exit."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Store the error; do not catch Failure, Unchecked and interruptions."""
        if isinstance(error, self._types) and not isinstance(error, (Failure, Unchecked)):
            self.error = error
            return True
        return False


@dataclass(frozen=True)
class Trial:
    """One operation of one backend, in one dtype on one device.

    Attributes:
        spec: of the operation.
        function: the judged implementation.
        dtype: of the floating-point inputs.
        device: "cpu" or "cuda".
        source: the device that draws the elements.
    """

    spec: Spec
    function: Function
    dtype: torch.dtype
    device: str
    source: str = "cpu"

    def cases(self, profile: Profile) -> SearchStrategy[Case]:
        """A strategy for cases, with the options that the judged function accepts."""
        return self.spec.cases(profile.elements, accepted_options(self.function, self.spec))

    def inputs(self, case: Case) -> Inputs:
        """The tensors of a case."""
        return self.spec.inputs(case, self.dtype, self.device, self.source)

    def options(self, case: Case) -> Options:
        """The keywords of a case, without those that the judged function does not accept."""
        required = self.spec.required(case, self.dtype)
        accepted = {*accepted_options(self.function, self.spec), *required}
        return required | {name: value for name, value in case.options if name in accepted}

    def rowwise(self, case: Case) -> Case:
        """The case with options under which every output has one entry per row."""
        accepted = accepted_options(self.function, self.spec)
        return case.with_options({name: v for name, v in self.spec.row_options.items() if name in accepted})

    def grad_outputs(self, case: Case, outputs: Sequence[Tensor]) -> list[Tensor]:
        """A gradient for each output, the same on every device."""
        draw = Draw(replace(case, seed=case.seed + 100), self.dtype, self.device, self.source)
        return [draw.grad_output(output) for output in outputs]

    def call(self, inputs: Inputs, options: Options, function: Function | None = None) -> tuple[Tensor, ...]:
        """The outputs as a tuple; raises Failure if the function raises or returns something else, and Lacking."""
        with Caught() as caught:
            return self._outputs(inputs, options, function)
        raised = f"raised {describe(caught.error)}"
        for name, value in options.items():
            if name in self.spec.drawing.added and value == self.spec.drawing.added[name]:
                raise Refused(f"{name}={value}, which the example does not have, is refused: {raised}")
        if isinstance(caught.error, NotImplementedError):
            plain, drawn = self.spec.without_options(options), self.spec.drawing.options.items()
            for one in ({}, *({name: value} for name, values in drawn for value in values[1:])):
                with Caught() as other:
                    self._outputs(inputs, plain | one, function)
                if not isinstance(other.error, NotImplementedError) or self.spec.arguments(inputs) is not inputs:
                    raise Lacking(raised) from caught.error
        raise Failure(raised) from caught.error

    def _outputs(self, inputs: Inputs, options: Options, function: Function | None) -> tuple[Tensor, ...]:
        written = {name: calling.copied(inputs[name]) for name in self.spec.in_place if name in inputs}
        positional, by_name = calling.placed(self.spec.reference, self.spec.arguments({**inputs, **written}))
        found = (function or self.function)(*positional, **by_name, **options)
        for name, copy in written.items():
            calling.return_surroundings(inputs[name], copy)
        outputs = tuple(calling.results(found, list(written.values())))
        wrong = [type(output).__name__ for output in outputs if not isinstance(output, Tensor)]
        if wrong or len(outputs) != len(self.spec.outputs):
            seen = f"a {wrong[0]}" if wrong else counted(len(outputs), "tensor")
            if written:
                seen = f"{seen}, with {' and '.join(written)} written in place"
            raise Failure(f"returned {seen}, should be {len(self.spec.outputs)} of Tensor: {self.spec.outputs}")
        return outputs

    def run(
        self,
        case: Case,
        inputs: Inputs | None = None,
        *,
        function: Function | None = None,
        grads: Sequence[str] | None = None,
        grad_outputs: Sequence[Tensor] | None = None,
    ) -> Run:
        """Run the forward and the backward pass.

        Args:
            case: its options are passed, and its seed draws the gradients of the outputs.
            inputs: those of the case by default.
            function: the judged one by default.
            grads: inputs to differentiate with respect to; those of the spec by default; none to run only the forward
                pass.
            grad_outputs: gradients of the outputs, drawn by default.

        Raises:
            Failure: a pass raised, or a gradient is missing.
        """
        inputs = inputs or self.inputs(case)
        grads = [name for name in (self.spec.grads if grads is None else grads) if name in inputs]
        leaves = as_leaves(inputs, grads)
        with Interpreted() as forward:
            outputs = self.call(leaves, self.options(case), function)
        if not grads:
            return Run(outputs, {}, bool(forward))
        if grad_outputs is None:
            grad_outputs = self.grad_outputs(case, outputs)
        with Interpreted() as backward:
            gradients = self.backward(outputs, leaves, grads, grad_outputs)
        return Run(detached(outputs), gradients, bool(forward), bool(backward))

    def backward(
        self,
        outputs: Sequence[Tensor],
        leaves: Inputs,
        grads: Sequence[str],
        grad_outputs: Sequence[Tensor],
        keep: bool = False,
    ) -> dict[str, Tensor]:
        """Gradients by name, of the requested inputs that the case has; `keep` retains the graph."""
        grads = [name for name in grads if name in leaves]
        if not grads:
            return {}
        if not any(output.requires_grad for output in outputs):
            names = " and ".join(self.spec.outputs)
            raise Failure(f"output {names} has no graph, although {' and '.join(grads)} require gradients")
        # Skip outputs that depend on no input; if one should depend, a gradient below is missing or wrong.
        pairs = [pair for pair in zip(outputs, grad_outputs, strict=True) if pair[0].requires_grad]
        for name in grads:
            leaves[name].grad = None
        with Caught() as caught:
            torch.autograd.backward(*zip(*pairs, strict=True), retain_graph=keep)
        if caught.error is not None:
            raise Failure(f"backward raised {describe(caught.error)}") from caught.error
        found = {name: gradient for name in grads if (gradient := leaves[name].grad) is not None}
        for name in grads:
            if name not in found:
                raise Failure(f"gradient of {name} is missing (None)")
        return found

    def judge(
        self,
        case: Case,
        run: Run,
        inputs: Inputs | None = None,
        grad_outputs: Sequence[Tensor] | None = None,
        peer: Run | None = None,
    ) -> float:
        """Compare a run with the truth; returns the budget use, raises Failure. The default peer is the reference."""
        inputs = inputs or self.inputs(case)
        names = list(run.grads)
        peer = peer or self.run(case, inputs, function=self.spec.reference, grads=names, grad_outputs=grad_outputs)
        if grad_outputs is None:
            grad_outputs = self.grad_outputs(case, peer.outputs)
        budget = self.spec.budget
        if budget.measured:
            return self._judge_measured(case, run, peer, inputs, grad_outputs)
        call = call_of(inputs, self.options(case), grad_outputs, self.dtype)
        contract = budget.truth or self.spec.reference
        truth = self.run(case, call.inputs, function=contract, grads=names, grad_outputs=call.grad_outputs)
        used = 0.0
        for (key, name, y), truncates, (_, _, p), (_, _, r) in zip(
            run.named(self.spec), run.interpreted(), peer.named(self.spec), truth.named(self.spec), strict=True
        ):
            model = ErrorModel(
                error=budget.error(key, replace(call, truncates=truncates), r),
                elements=call.elements,
                roundings=budget.roundings,
                random=case.fill not in self.spec.drawing.alike,
                truncates=truncates,
                ties=False,
            )
            used = max(used, judge(name, y, r, p, model))
        return used

    def _judge_measured(self, case: Case, run: Run, peer: Run, inputs: Inputs, grad_outputs: Sequence[Tensor]) -> float:
        """As `judge`, for an operation whose condition is measured."""
        names = [name for name in self.spec.grads if name in inputs] if run.grads else []

        def again(tensors: Inputs, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
            found = self.run(case, tensors, function=self.spec.reference, grads=names, grad_outputs=gradients)
            return {name: tensor for _, name, tensor in found.named(self.spec)}

        key = self.spec.op, id(self.spec), str(self.options(case)), tuple(names)
        measured = condition.measured(again, inputs, grad_outputs, self.dtype, key)
        elements = max(tensor.numel() for tensor in inputs.values())
        ordinary = all(bool(t.isfinite().all()) for t in (*inputs.values(), *grad_outputs) if is_float(t))
        used = 0.0
        for (_, name, y), truncates, (_, _, p) in zip(
            run.named(self.spec), run.interpreted(), peer.named(self.spec), strict=True
        ):
            response = measured[name]
            other = response.other
            if ordinary and name.startswith("gradient"):  # autograd multiplies infinity by 0, where no formula does
                other = other.masked_fill(response.truth.isnan(), 0.0)
            if not p.is_floating_point():
                bounds = response.lowest, response.highest
                judge_exact(name, y, response.truth, p, response.flips, *bounds, response.distinct)
                continue
            model = ErrorModel(
                error=response.beside(p),
                elements=elements,
                roundings=1,
                random=case.fill not in self.spec.drawing.alike,
                truncates=truncates,
                jumps=response.jumps,
                other=other,
            )
            used = max(used, judge(name, y, response.truth, p, model))
        return used

    def refused(self, case: Any) -> str | None:
        """Why the reference refuses a case; None if it does not, or if the spec draws only valid cases."""
        if not self.spec.drawing.partial:
            return None
        with Caught() as caught:
            try:
                self.run(case, function=self.spec.reference)
            except Failure as failure:
                return str(failure)
        return describe(caught.error) if caught.error is not None else None


def call_of(inputs: Inputs, options: Options, grad_outputs: Sequence[Tensor], dtype: torch.dtype) -> Call:
    """The call as a spec's terms see it."""
    wide = {name: widen(tensor) for name, tensor in inputs.items()}
    wider = frozenset(name for name, tensor in inputs.items() if tensor.itemsize > dtype.itemsize)
    return Call(wide, options, [widen(gradient) for gradient in grad_outputs], dtype, wider=wider)


def as_leaves(tensors: Inputs, grads: Sequence[str]) -> Inputs:
    """The same memory as leaves of a new graph, of which those named require a gradient."""
    return {name: tensor.detach().requires_grad_(name in grads) for name, tensor in tensors.items()}


def detached(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same memory outside any graph."""
    return tuple(tensor.detach() for tensor in tensors)


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers: NaN equals NaN, and -0 differs from 0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def demand_same_bits(spec: Spec, first: Run, second: Run, message: str) -> None:
    """Raise Failure if two runs differ in any bit; `message` states the property that this violates."""
    for (_, name, one), (_, _, other) in zip(first.named(spec), second.named(spec), strict=True):
        if one.shape != other.shape:
            raise Failure(f"{message}: {name} has shape {list(one.shape)}, then {list(other.shape)}")
        differs = bits(one) != bits(other)
        if differs.any():
            index = tuple(differs.nonzero()[0].tolist())
            raise Failure(
                f"{message}: {name} differs in {int(differs.sum())} of {differs.numel()} elements,"
                f" first at index {index}\nfirst {float(one[index])!r}, then {float(other[index])!r}"
            )


def describe(error: BaseException | None) -> str:
    """An exception in one line."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

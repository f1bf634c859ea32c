"""Do the operations under a model agree with the reference on the model's own inputs? Each call is computed again.

A shadowed backend has the same operations. While its `Watch` is on, each call of a fast operation is also computed by
the reference, and the errors are compared. The model's graph stays as it is, and with it every bit: the outputs are
compared when the call returns, and the gradients are computed again when those of its outputs are known.

What is allowed needs no spec: see `comparisons` in unsloth_fast/comparison.py.

The inputs of a call wait for its backward pass as autograd saves tensors: a checkpoint recomputes them.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import Module

from unsloth_fast.backends import Backend
from unsloth_fast.call_tensors import (
    Tensors,
    output_names,
    results_of,
    shapes_of,
    sum_of_bits,
    take_tensors,
    with_tensors,
)
from unsloth_fast.comparison import comparisons
from unsloth_fast.failures import FAILURES
from unsloth_ref import kernels as reference_kernels


@dataclass(frozen=True)
class Finding:
    """How far one result of one call is from the reference.

    Attributes:
        operation: its name.
        module: the name of the module that called it.
        inputs: its tensors, such as "x [1, 8, 64] bfloat16, weight [64] bfloat16".
        result: "output" or "gradient of x".
        which: "root mean square" or "largest" error, or what else is wrong with the result.
        measured: the error.
        allowed: the largest that is allowed.
        used: measured / allowed: the budget use.
    """

    operation: str
    module: str
    inputs: str
    result: str
    which: str
    measured: float
    allowed: float
    used: float

    def __str__(self) -> str:
        """All of it in one line."""
        return (
            f"{self.operation} in {self.module}, {self.result} of ({self.inputs}): {self.which} error "
            f"{self.measured:.3g}, allowed {self.allowed:.3g}, {self.used:.3g} times the budget"
        )


@dataclass
class Watch:
    """Turns shadowing on, and collects what it finds.

    Attributes:
        findings: one for each result of each call, in the order in which they were compared.
        unverified: why calls were not compared, by operation.
        on: whether calls are shadowed.
    """

    findings: list[Finding] = field(default_factory=list[Finding])
    unverified: dict[str, str] = field(default_factory=dict[str, str])
    on: bool = False
    _names: dict[int, str] = field(default_factory=dict[int, str])

    @contextmanager
    def watching(self, model: Module) -> Iterator[None]:
        """Shadow the calls within the context, forward and backward passes of this model."""
        self._names = {id(module): name for name, module in model.named_modules()}
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def take(self) -> tuple[list[Finding], dict[str, str]]:
        """What was found since this was last called."""
        taken = self.findings, self.unverified
        self.findings, self.unverified = [], {}
        return taken

    def name_of(self, module: Module | None) -> str:
        """See `caller`."""
        return caller(self._names, module)


def shadowed(backend: Backend, watch: Watch) -> Backend:
    """The backend with every operation that is not the reference's shadowed while the watch is on."""
    own = vars(backend.kernels)
    shadows = {name: _shadow(name, own[name], watch) for name in fast_operations(backend)}
    return replace(backend, kernels=SimpleNamespace(**own | shadows))


def fast_operations(backend: Backend) -> tuple[str, ...]:
    """The operations of a backend that are not the reference's."""
    own = vars(backend.kernels)
    return tuple(name for name in reference_kernels.__all__ if own[name] is not getattr(reference_kernels, name))


def calling_module() -> Module | None:
    """The module whose forward runs, the innermost one; None outside of any."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Module):
            return owner
        frame = frame.f_back
    return None


def caller(names: Mapping[int, str], module: Module | None) -> str:
    """What a call is named after: its module, or the class of one outside of the model, or what runs without a module.

    Args:
        names: of the model's modules, by id.
        module: as `calling_module` returns it.
    """
    if module is None:
        return "outside" if torch._C._current_graph_task_id() == -1 else "backward"
    return names.get(id(module)) or type(module).__name__


def _shadow(name: str, function: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    signature = inspect.signature(getattr(reference_kernels, name))

    @functools.wraps(function)
    def shadow(*args: Any, **kwargs: Any) -> Any:
        if not watch.on or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        constants = signature.bind(*args, **kwargs).arguments
        tensors = take_tensors(constants)
        trained = tuple(key for key, value in tensors.items() if value.requires_grad)
        inputs = {key: value.detach() for key, value in tensors.items()}
        call = _Call(watch, name, watch.name_of(calling_module()), function, constants, trained)
        bits = {key: sum_of_bits(value) for key, value in inputs.items()}
        found = function(*args, **kwargs)
        outputs = results_of(found)
        if not call.has_form(inputs, bits, outputs):
            return found
        differentiable = [output for output in outputs if output.requires_grad]
        if differentiable and trained:
            node: Any = _Saved.apply(torch.empty(0, requires_grad=True), *inputs.values()).grad_fn
            hook = functools.partial(call.compare_gradients, tuple(inputs), [node], [o.requires_grad for o in outputs])
            if len(differentiable) == 1:  # the hook of several does not see a loss from which the backward pass starts
                differentiable[0].register_hook(lambda gradient: hook((gradient,)))
            else:
                register_multi_grad_hook(differentiable, hook)
        if torch._C._current_graph_task_id() == -1:  # a backward pass only computes again what was compared
            call.compare_outputs(inputs, outputs)
        return found

    return shadow


class _Saved(torch.autograd.Function):
    """A node outside of the model's graph that saves the inputs of a call."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        """A tensor whose grad_fn has them."""
        ctx.save_for_backward(*tensors)
        return anchor.clone()


@dataclass(frozen=True)
class _Call:
    """One call of an operation.

    Attributes:
        watch: takes what is found.
        operation: its name.
        module: the name of the module that called it.
        function: the operation under the model.
        constants: its arguments that are no tensors, and lists of tensors with None in the place of each.
        trained: the names of those that get a gradient.
    """

    watch: Watch
    operation: str
    module: str
    function: Callable[..., Any]
    constants: dict[str, Any]
    trained: tuple[str, ...]

    def has_form(self, tensors: Tensors, bits: Tensors, outputs: Sequence[Any]) -> bool:
        """Whether the outputs are tensors; a finding for each that is none or lost its gradient, and changed inputs.

        Args:
            tensors: the inputs, after the call.
            bits: the sums of their bits before it.
            outputs: what the call returned.
        """
        shapes, names = shapes_of(tensors), output_names(outputs)
        others = [type(output).__name__ for output in outputs if not isinstance(output, Tensor)]
        if others:
            self._find(shapes, "output", f"{others[0]} instead of a tensor")
            return False
        for key in (key for key, value in tensors.items() if not torch.equal(sum_of_bits(value), bits[key])):
            self._find(shapes, key, "an input that the call wrote to,")
        if self.trained and torch.is_grad_enabled() and not all(output.requires_grad for output in outputs):
            for name, output, right in zip(names, outputs, self._outputs(self._leaves(tensors)), strict=False):
                if right.requires_grad and not output.requires_grad:
                    self._find(shapes, name, "a result without a gradient,")
        return True

    def _find(self, shapes: str, result: str, which: str) -> None:
        """Add what is wrong beside the numbers, once for each call."""
        finding = Finding(self.operation, self.module, shapes, result, which, math.inf, 0.0, sys.float_info.max)
        if finding not in self.watch.findings:  # a checkpoint calls again
            self.watch.findings.append(finding)

    def compare_outputs(self, tensors: Tensors, outputs: Sequence[Tensor]) -> None:
        """Compare the outputs of the forward pass."""
        found = [output.detach() for output in outputs]
        self._compare(output_names(outputs), tensors, {}, lambda: found, self._outputs)

    def compare_gradients(
        self, names: Sequence[str], node: list[Any], differentiable: Sequence[bool], gradients: Sequence[Tensor | None]
    ) -> None:
        """Compare the gradients that the operation computes from those of its outputs.

        Args:
            names: of the saved inputs.
            node: the one that saved them, taken out so that their memory is freed.
            differentiable: which outputs have gradients.
            gradients: of those outputs; None for one that is not used.
        """
        if not self.watch.on:
            return
        places = [place for place, differs in enumerate(differentiable) if differs]
        incoming = {str(p): gradient for p, gradient in zip(places, gradients, strict=True) if gradient is not None}
        try:
            tensors = dict(zip(names, node.pop().saved_tensors, strict=True))
        except RuntimeError as error:  # the model wrote over an input that the operation did not save
            self.watch.unverified[self.operation] = _first_line(error)
            return
        own = functools.partial(self._gradients, self.function, tensors | incoming, incoming)
        run = functools.partial(self._gradients_of_reference, incoming=tuple(incoming))
        self._compare([f"gradient of {key}" for key in self.trained], tensors, incoming, own, run)

    def _outputs(self, tensors: Tensors) -> list[Tensor]:
        return results_of(getattr(reference_kernels, self.operation)(**with_tensors(self.constants, tensors)))

    def _gradients_of_reference(self, tensors: Tensors, incoming: Sequence[str]) -> list[Tensor]:
        found = self._gradients(getattr(reference_kernels, self.operation), tensors, incoming)
        wanted = zip(self.trained, found, strict=True)
        return [torch.zeros_like(tensors[key]) if gradient is None else gradient for key, gradient in wanted]

    def _gradients(
        self, function: Callable[..., Any], tensors: Tensors, incoming: Collection[str]
    ) -> list[Tensor | None]:
        """The gradients of the trained inputs; None for one that the function does not return."""
        inputs = {key: tensor for key, tensor in tensors.items() if key not in incoming}
        leaves = self._leaves(inputs)
        with torch.enable_grad():
            outputs = results_of(function(**with_tensors(self.constants, leaves)))
        used = [place for place in incoming if outputs[int(place)].requires_grad]
        wanted = [leaves[key] for key in self.trained]
        results, given = [outputs[int(place)] for place in used], [tensors[place] for place in used]
        return list(torch.autograd.grad(results, wanted, given, allow_unused=True))

    def _leaves(self, tensors: Tensors) -> Tensors:
        return {key: tensor.detach().requires_grad_(key in self.trained) for key, tensor in tensors.items()}

    def _compare(
        self,
        names: Sequence[str],
        tensors: Tensors,
        incoming: Tensors,
        own: Callable[[], Sequence[Tensor | None]],
        run: Callable[[Tensors], list[Tensor]],
    ) -> None:
        """Add a finding for each result.

        Args:
            names: of the results.
            tensors: the inputs.
            incoming: gradients of outputs, further inputs of the results.
            own: the results of the operation.
            run: those of the reference, on inputs of any dtype.
        """
        shapes, inputs = shapes_of(tensors), tensors | incoming
        try:
            with torch.no_grad(), torch.autocast(next(iter(inputs.values())).device.type, enabled=False):
                errors = list(comparisons(own(), inputs, run))
        except FAILURES as error:  # memory for the reference among them
            self.watch.unverified[self.operation] = f"{shapes}: {type(error).__name__}: {_first_line(error)}"
            return
        for name, error in zip(names, errors, strict=True):
            numbers = (error.measured, error.allowed, min(error.used, sys.float_info.max))
            self.watch.findings.append(Finding(self.operation, self.module, shapes, name, error.which, *numbers))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

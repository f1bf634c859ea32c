"""Calls of a reference that the project has never heard of: is it a function, whose results its inputs determine?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conformance import calling
from conformance.case import Case
from conformance.declarations import SpecError
from conformance.spec import Inputs, Spec
from conformance.trial import Caught, as_leaves, bits, describe

PRESENT = "given"  # the value of an optional tensor that is there


def call(spec: Spec, case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """Call the reference on a case, and return its outputs, however many there are; raises any error of it."""
    written = {name: calling.copied(inputs[name]) for name in spec.in_place if name in inputs}
    positional, by_name = calling.placed(spec.reference, {**inputs, **written})
    options = {**spec.drawing.required(case), **{n: v for n, v in case.options if v != PRESENT}}
    return tuple(calling.results(spec.reference(*positional, **by_name, **options), list(written.values())))


def outputs_of(spec: Spec, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs of the reference on the example.

    Raises:
        SpecError: it raises, or returns what cannot be judged.
    """
    with Caught() as caught:
        outputs = call(spec, case, inputs)
    if caught.error is not None:
        raised = f"raised {describe(caught.error)}, on the example's sizes and options with drawn elements"
        raise SpecError(f"reference: {spec.op} {raised}") from caught.error
    if not outputs or not all(isinstance(output, Tensor) for output in outputs):
        kinds = ", ".join(type(output).__name__ for output in outputs) or "nothing"
        raise SpecError(f"reference: {spec.op} returned {kinds}; allowed: tensors, in tuples, lists or dicts")
    for output in outputs:
        if output.is_complex() or output.layout != torch.strided:
            kind = output.dtype if output.is_complex() else output.layout
            raise SpecError(f"reference: {spec.op} returned a tensor of {kind}; allowed: dense ones of real numbers")
    return outputs


def demand_function(spec: Spec, case: Case, inputs: Inputs) -> None:
    """Raise SpecError unless two calls of the reference give the same results, and change nothing else."""
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    first, second = (outputs_of(spec, case, inputs) for _ in range(2))
    for name, tensor in inputs.items():
        if not bits(tensor).equal(bits(before[name])):
            raise SpecError(f"reference: {spec.op} changes {name}; allowed: only what --in-place names")
    for one, other in zip(first, second, strict=False):
        if one.shape != other.shape or not bits(one).equal(bits(other)):
            raise SpecError(f"reference: {spec.op} gives other results in a second call; allowed: always the same")


def reached(outputs: Sequence[Tensor], inputs: Inputs) -> list[str]:
    """The inputs that require a gradient and get one from these outputs; none if autograd refuses what is in place."""
    roots = [output for output in outputs if output.requires_grad]
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    if not roots:
        return []
    with Caught():
        found = torch.autograd.grad(roots, [*leaves.values()], [torch.ones_like(r) for r in roots], allow_unused=True)
        return [name for name, gradient in zip(leaves, found, strict=True) if gradient is not None]
    return []


def takes_gradients(spec: Spec, case: Case, inputs: Inputs, name: str) -> bool:
    """Whether the reference takes an input that requires a gradient: torch's cross entropy refuses such a `weight`."""
    with Caught() as caught:
        if inputs[name].is_floating_point():
            call(spec, case, as_leaves(inputs, [name]))
    return caught.error is None and inputs[name].is_floating_point()


def fits(spec: Spec, case: Case) -> bool:
    """Whether the reference is a function for this case too, with the outputs and gradients of the example."""
    with Caught():
        inputs = spec.inputs(case, torch.float32, "cpu")
        demand_function(spec, case, inputs)
        leaves = as_leaves(inputs, spec.grads)
        outputs = outputs_of(spec, case, leaves)
        return len(outputs) == len(spec.outputs) and set(reached(outputs, leaves)) == set(spec.grads)
    return False


class OperatorCount(TorchDispatchMode):
    """Counts operators, and the elements that they produce."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, add up its results."""
        found = func(*args, **(kwargs or {}))
        self.operators += 1
        self.elements += sum(t.numel() for t in tree_leaves(found) if isinstance(t, Tensor))
        return found


class Overwriting(TorchDispatchMode):
    """Sees whether `scatter` writes several numbers to one place: torch's gradient is then wrong, as its guide says.

    Attributes:
        found: whether it does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        if func._schema.name in ("aten::scatter", "aten::scatter_") and isinstance(args[3], Tensor):
            self.found |= bool((args[2].sort(args[1]).values.diff(dim=args[1]) == 0).any())
        return func(*args, **(kwargs or {}))

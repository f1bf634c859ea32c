"""Calls of a reference that the project has never heard of: is it a function, whose results its inputs determine?"""

from typing import Any

import torch
from torch import Tensor

from conformance import calling
from conformance.case import Case
from conformance.declarations import SpecError
from conformance.spec import Inputs, Spec
from conformance.trial import Caught, bits, describe

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
        raise SpecError(f"reference: {spec.op} raised {describe(caught.error)}, on the example") from caught.error
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

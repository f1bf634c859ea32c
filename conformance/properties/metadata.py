"""Outputs and gradients have the structure, shape, dtype and device of the contract, and memory of their own.

Where a result of the contract is a view of an input, as that of a transposition, it may be one. Autograd itself returns
views of the incoming gradient, for a sum over sizes of 1 for example: gradients of PyTorch's own nodes may be views.

Two results may be parts of one tensor. Where they have elements in common, scaling one gradient, or adding to one
output in place, changes the other too.
"""

from itertools import combinations

import torch
from torch import Tensor

from conformance.calling import same_memory
from conformance.case import Case
from conformance.instruments.plain import is_plain
from conformance.property import Property, of_file
from conformance.tolerances.gates import Failure
from conformance.trial import Run, Trial, as_leaves


def check(trial: Trial, case: Case) -> None:
    """Compare with the reference, and compare storages with those of the inputs."""
    inputs = as_leaves(trial.inputs(case), trial.spec.grads)
    outputs = trial.call(inputs, trial.options(case))
    plain = is_plain(outputs)
    reference = trial.spec.reference
    grad_outputs = trial.grad_outputs(case, trial.run(case, inputs, function=reference, grads=()).outputs)
    wanted = trial.run(case, inputs, function=reference, grad_outputs=grad_outputs)
    run = Run(outputs, trial.backward(outputs, inputs, trial.spec.grads, grad_outputs))
    pairs = list(zip(run.named(trial.spec), wanted.named(trial.spec), strict=True))
    for (_, name, seen), (_, _, right) in pairs:
        for what in ("shape", "dtype", "device"):
            if getattr(seen, what) != getattr(right, what):
                raise Failure(f"{name} has {what} {getattr(seen, what)}, should be {getattr(right, what)}")
        gradients = [] if plain else [("grad_output", gradient) for gradient in grad_outputs]
        for other_name, other in (*inputs.items(), *gradients):
            if same_memory(seen, other) and not same_memory(right, other):
                raise Failure(f"{name} shares the memory of {other_name}")
    for (one, right), (other, right_other) in combinations(pairs[: len(outputs)] if plain else pairs, 2):
        if _overlap(one[2], other[2]) and not _overlap(right[2], right_other[2]):
            raise Failure(f"{one[1]} has elements in common with {other[1]}: a change of one in place changes both")


def _overlap(one: Tensor, other: Tensor) -> bool:
    return same_memory(one, other) and bool(torch.isin(_bytes(one), _bytes(other)).any())


def _bytes(tensor: Tensor) -> Tensor:
    """The first byte of each element, counted from the start of the memory."""
    size = tensor.element_size()
    places = torch.arange(tensor.untyped_storage().nbytes() // size) * size
    return places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()


PROPERTY = Property(*of_file(check), share=0.2)

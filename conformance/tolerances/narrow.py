"""Which numbers a reference rounds to 16 bits, in a run in the dtype under test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from torch import Tensor

from conformance.tolerances.disturbance import Order, Rounded


@dataclass(frozen=True)
class Narrow:
    """The reference's roundings to 16 bits: of operators' results, of inputs, and which are the last of a result."""

    flags: list[bool]
    inputs: set[str]
    last: set[int]


def narrow_of(
    again: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
    grad_outputs: Sequence[Tensor],
    order: Order,
    truth: Mapping[str, Tensor],
) -> Narrow:
    """The roundings of the run in the dtype under test, by their places in the run in float64."""
    with Rounded() as rounded:
        results = again(inputs, grad_outputs)
    cast = {name for name, tensor in inputs.items() if tensor.untyped_storage().data_ptr() in rounded.inputs}
    last = {place for name, r in truth.items() if results[name].element_size() == 2 for place in order.last(r)}
    flags = rounded.narrow
    if rounded.names != order.names:
        flags = [True] * len(order.names)  # where the runs differ
        blocks = SequenceMatcher(None, order.names, rounded.names, autojunk=False).get_matching_blocks()
        for mine, theirs, size in blocks:
            flags[mine : mine + size] = rounded.narrow[theirs : theirs + size]
    return Narrow(flags, cast, last)

"""Which tensors does a call of an operation take and return? By name, those of lists too."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unsloth_ref.types import QuantisedWeight

Tensors = dict[str, Tensor]


def take_tensors(arguments: dict[str, Any]) -> Tensors:
    """Take the tensors out of a call's arguments, those of lists too: by name, such as "x" and "weight[0]"."""
    taken: Tensors = {}
    for key, value in list(arguments.items()):
        if isinstance(value, Tensor):
            taken[key] = arguments.pop(key)
        elif isinstance(value, list | tuple) and not isinstance(value, QuantisedWeight):
            taken |= {f"{key}[{place}]": one for place, one in enumerate(value) if isinstance(one, Tensor)}
            arguments[key] = [None if isinstance(one, Tensor) else one for one in value]
    return taken


def with_tensors(constants: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The inverse: the arguments of a call with these tensors."""
    arguments = {key: list(value) if isinstance(value, list) else value for key, value in constants.items()}
    for name, tensor in tensors.items():
        key, bracket, place = name.partition("[")
        if bracket:
            arguments[key][int(place[:-1])] = tensor
        else:
            arguments[key] = tensor
    return arguments


def shapes_of(tensors: Tensors) -> str:
    """Such as "x [1, 8, 64] bfloat16, weight [64] bfloat16"."""
    return ", ".join(f"{key} {list(value.shape)} {str(value.dtype)[6:]}" for key, value in tensors.items())


def output_names(outputs: Sequence[Any]) -> list[str]:
    """What the outputs of a call are called in messages."""
    return ["output"] if len(outputs) == 1 else [f"output {place}" for place in range(len(outputs))]


def sum_of_bits(tensor: Tensor) -> Tensor:
    """The sum of the elements as integers, 0-dim int64, which changes with any one of them."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integer).sum(dtype=torch.int64)


def results_of(found: Any) -> list[Tensor]:
    """The outputs of a call as a list."""
    return list(found) if isinstance(found, tuple) else [found]

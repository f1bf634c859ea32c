"""What a recorded stack returns: the last hidden states, and with experts possibly the logits of its routers.

The logits of all layers are one tensor within a recording: one copy for all of them leaves a replay.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

HIDDEN, ROUTERS = "last_hidden_state", "router_logits"


def stacked_outputs(run: Callable[[], Any], size: int) -> ModelOutput:
    """The outputs of a stack, the router logits [size, E] of its layers as one tensor [layers, size, E].

    Args:
        run: the forward of the stack.
        size: tokens of the batch.

    Raises:
        ValueError: there are others than hidden states and router logits, or these have other shapes.
    """
    outputs = run()
    names = list(outputs) if isinstance(outputs, ModelOutput) else ["a tuple"]
    if HIDDEN not in names or not {HIDDEN, ROUTERS}.issuperset(names):
        raise ValueError(f"the stack returns {', '.join(names)}")
    if ROUTERS in names:
        kinds = {(tuple(one.shape), one.dtype) for one in outputs[ROUTERS]}
        shapes = [shape for shape, _ in kinds]
        if len(kinds) != 1 or len(shapes[0]) != 2 or shapes[0][0] != size:
            raise ValueError(f"router logits of {', '.join(str(list(shape)) for shape in shapes) or 'no layer'}")
        outputs[ROUTERS] = torch.stack(outputs[ROUTERS])
    return outputs


def returned_outputs(kind: type[Any], names: Sequence[str], tensors: Iterable[Tensor]) -> Any:
    """The outputs as the stack returns them.

    Args:
        kind: the type of the outputs.
        names: of the tensors.
        tensors: as those of `stacked_outputs`.
    """
    found: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return kind(**{name: one.unbind() if name == ROUTERS else one for name, one in found.items()})


def gradients_of(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], grads: Sequence[Tensor], **options: bool
) -> tuple[Tensor, ...]:
    """The gradients of the parameters for those of outputs, some of which may have no gradient."""
    trained = [one.requires_grad for one in outputs]
    wanted, given = list(compress(outputs, trained)), list(compress(grads, trained))
    return torch.autograd.grad(wanted, parameters, given, **options)


def leaves_of(outputs: Iterable[Tensor]) -> set[Tensor]:
    """The tensors to which a backward pass adds gradients; some may be made in each forward pass."""
    found, seen, waiting = set[Tensor](), set[object](), [one.grad_fn for one in outputs]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if type(node).__name__ == "AccumulateGrad":
            found.add(node.variable)
    return found

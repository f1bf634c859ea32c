"""Which results plain PyTorch computed."""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

PLAIN_NODE = re.compile(r"\w*Backward\d+|torch::autograd::(AccumulateGrad|CopySlices|GraphRoot)")


def is_plain(outputs: Sequence[Tensor]) -> bool:
    """Whether the graphs of these outputs consist of PyTorch's own autograd nodes, whose names end with a number."""
    nodes: set[Any] = set()
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [before for before, _ in node.next_functions]
    return all(PLAIN_NODE.fullmatch(node.name()) for node in nodes)

"""torch.compile of the reference, with its defaults."""

from functools import cache
from typing import Any

import torch

from unsloth_ref import kernels

# Nearly every case has other sizes or options, and each needs a graph of its own.
torch._dynamo.config.recompile_limit = 10_000


@cache
def __getattr__(name: str) -> Any:
    if name not in kernels.__all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    compiled: Any = torch.compile(getattr(kernels, name))
    compiled.__wrapped__ = getattr(kernels, name)  # for its signature
    return compiled

"""Argument checks of weights in 4 bits, which both backends call."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from unsloth_ref import checks

NF4_BLOCK, NF4_GROUP = 64, 256  # elements with one scale, and such scales with one scale of their own


def nf4_arguments(
    packed: Tensor,
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    sizes: Sequence[int],
    result: torch.dtype,
) -> None:
    """Check the parts of a weight in 4 bits, of these sizes, and the dtype of the result."""
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape: got {list(sizes)}; allowed: sizes from 0")
    if result not in checks.FLOATS:
        raise TypeError(f"dtype: got {result}; allowed: {', '.join(map(str, checks.FLOATS))}")
    size, wide = prod(sizes), (torch.float32, torch.float64)
    checks.dtype("packed", packed, (torch.uint8,))
    if packed.numel() != -(-size // 2):
        wanted = f"{-(-size // 2)} elements, two of shape {list(sizes)} each"
        raise ValueError(f"packed: got {packed.numel()} elements; allowed: {wanted}")
    nested = {"nested_code": nested_code, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    given = {name: tensor for name, tensor in nested.items() if tensor is not None}
    if 0 < len(given) < len(nested):
        missing = next(name for name in nested if name not in given)
        raise ValueError(f"{missing}: got None with {next(iter(given))}; allowed: {', '.join(nested)}, or none of them")
    checks.dtype("absmax", absmax, (torch.uint8,) if given else wide)
    blocks = -(-size // NF4_BLOCK)
    checks.shape("absmax", absmax, (blocks,), f"one per {NF4_BLOCK} elements")
    checks.same_device("absmax", absmax, "packed", packed)
    shapes = {"nested_code": (256,), "nested_absmax": (-(-blocks // NF4_GROUP),), "nested_offset": ()}
    meanings = "one per value of absmax", f"one per {NF4_GROUP} blocks", "a single number"
    for (name, tensor), meaning in zip(given.items(), meanings, strict=False):
        checks.dtype(name, tensor, wide if name == "nested_code" else (given["nested_code"].dtype,))
        checks.shape(name, tensor, shapes[name], meaning)
        checks.same_device(name, tensor, "packed", packed)

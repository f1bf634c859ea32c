"""bitsandbytes, which defines weights in 4 bits; its users store them in a QuantState."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conformance.peers import import_kernels, operation
from unsloth_ref.nf4_checks import NF4_BLOCK, NF4_GROUP

_dequantize, _State = import_kernels(
    "bitsandbytes", "bitsandbytes.functional:dequantize_4bit", "bitsandbytes.functional:QuantState"
)


@operation
def nf4_dequantize(
    packed: Tensor, absmax: Tensor, nested_code: Any = None, nested_absmax: Any = None, nested_offset: Any = None, *,
    shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Two launches and a sum with nested scales, one without."""
    nested = None
    if nested_code is not None:
        nested = _State(absmax=nested_absmax, code=nested_code, blocksize=NF4_GROUP, dtype=torch.float32)
    state = _State(
        absmax=absmax,
        shape=torch.Size(shape),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=nested_offset,
        state2=nested,
    )
    found: Tensor = _dequantize(packed, state)
    return found

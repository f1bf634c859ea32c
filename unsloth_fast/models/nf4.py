"""Weights of bitsandbytes' linear layers in 4 bits: are they stored in the form that the operations dequantise?"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unsloth_fast.failures import failures_of_kernels
from unsloth_fast.models.methods import is_more_than_its_class
from unsloth_ref.nf4_checks import NF4_BLOCK, NF4_GROUP
from unsloth_ref.types import NF4Weight

_KNOWN = "unsloth_nf4"  # the attribute of a QuantState that was checked; a weight that is quantised again has none
_REPACKED = "packing_format_for_cpu"  # one that evaluation on a CPU sets: the bytes are in another order
_BLOCKS = NF4_GROUP + 4  # in two groups


def is_known(layer: nn.Module, nf4_dequantize: Callable[..., Tensor]) -> bool:
    """Whether `weight_of` returns this layer's weight: bitsandbytes dequantises its first blocks to the same bits.

    A layer without memory, on the device "meta", and one that was repacked are not checked and not known.

    Args:
        layer: any linear layer.
        nf4_dequantize: the backend's, which is tried on the layer's device.
    """
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type == "meta" or getattr(state, _REPACKED, False):
        return False
    vars(state)[_KNOWN] = _is_nf4(weight, state) and _same_bits(weight, state, nf4_dequantize)
    return vars(state)[_KNOWN]


def weight_of(layer: nn.Module) -> NF4Weight | None:
    """The weight of a layer that is known, where it and its scales are now; None for any other layer.

    None also where a call of the layer does more than its class, and for an offloaded weight, which accelerate loads.
    """
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    known = getattr(state, _KNOWN, False) and not getattr(state, _REPACKED, False)
    return _weight(weight, state) if known and not weight.is_meta and not is_more_than_its_class(layer) else None


def _is_nf4(weight: Any, state: Any) -> bool:
    """Whether the state speaks of NF4 in blocks of 64 elements, with float32 scales or nested ones."""
    nested = state.state2
    scales = (state.absmax,) if nested is None else (nested.absmax, nested.code, state.offset)
    return (
        (state.quant_type, state.blocksize, weight.dtype) == ("nf4", NF4_BLOCK, torch.uint8)
        and len(state.shape) == 2
        and (nested is None or (nested.blocksize == NF4_GROUP and state.absmax.dtype == torch.uint8))
        and all(scale.dtype == torch.float32 for scale in scales)
    )


def _weight(weight: Any, state: Any) -> NF4Weight:
    nested = state.state2
    scales = (None, None, None) if nested is None else (nested.code, nested.absmax, state.offset)
    return NF4Weight(weight.data, state.absmax, *scales, tuple(state.shape))


def _same_bits(weight: Any, state: Any, nf4_dequantize: Callable[..., Tensor]) -> bool:
    """Compare the first blocks."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, absmax, code, scales, offset, _ = _weight(weight, state)
    size = min(2 * packed.numel(), _BLOCKS * NF4_BLOCK)
    blocks = -(-size // NF4_BLOCK)
    packed, absmax = packed.flatten()[: size // 2], absmax[:blocks]
    nested = None
    if scales is not None:
        scales = scales[: -(-blocks // NF4_GROUP)]
        nested = QuantState(scales, code=code, blocksize=NF4_GROUP, dtype=torch.float32)
    of_bitsandbytes = QuantState(absmax, (1, size), None, state.blocksize, "nf4", torch.float32, offset, nested)
    theirs = dequantize_4bit(packed[:, None], of_bitsandbytes).flatten()
    try:
        ours = nf4_dequantize(packed, absmax, code, scales, offset, shape=(size,), dtype=torch.float32)
    except failures_of_kernels():  # of a kernel that does not compile or run there
        return False
    return torch.equal(theirs, ours)

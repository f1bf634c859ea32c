"""unsloth; importing it needs a GPU and patches other packages in this process.

Its gated activations are not separate operations: they exist only inside its LoRA blocks.
"""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from conformance.peers import import_kernels, operation, refuse
from unsloth_ref.kernels.nf4_dequantize import CODE
from unsloth_ref.nf4_checks import NF4_BLOCK, NF4_GROUP
from unsloth_ref.types import IGNORE_INDEX

_rms_norm, _layer_norm, _rope, _rope_at, _losses, _loss, _linear_loss, _dequantize = import_kernels(
    "unsloth",
    "unsloth.kernels.rms_layernorm:Fast_RMS_Layernorm",
    "unsloth.kernels.layernorm:Fast_Layernorm",
    "unsloth.kernels.rope_embedding:fast_rope_embedding",
    "unsloth.kernels.rope_embedding:Fast_RoPE_Embedding_QK",
    "unsloth.kernels.cross_entropy_loss:Fast_CrossEntropyLoss",
    "unsloth.kernels.cross_entropy_loss:fast_cross_entropy_loss",
    "unsloth_zoo.fused_losses:unsloth_fused_ce_loss",
    "unsloth.kernels.utils:fast_dequantize",
)


@operation
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama") -> Tensor:
    """As fast_rms_layernorm."""
    if (offset, casting) not in ((0.0, "llama"), (1.0, "gemma")):
        supported = "offset=0.0, casting='llama' or offset=1.0, casting='gemma'"
        raise NotImplementedError(f"got offset={offset}, casting={casting!r}; allowed with unsloth: {supported}")
    return _rms_norm.apply(x, weight, eps, casting == "gemma")


@operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As fast_layernorm."""
    return _layer_norm.apply(x, weight, bias, eps)


@operation
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """As fast_rope_embedding: q and k are rotated in place where they have the layout that it needs."""
    refuse("unsloth", options, interleaved=False)
    if positions is not None:
        return _rope_at.apply(q, k, cos, sin, positions)
    if cos.shape[0] != 1:
        raise NotImplementedError(f"cos: got {len(cos)} sequences; allowed with unsloth: 1, or a table with positions")
    return _rope(q, k, cos, sin)


@operation
def cross_entropy(
    logits: Tensor, labels: Tensor, *, logit_scale: float = 1.0, softcap: float = 0.0,
    reduction: str = "mean", num_items: Any = None, **options: Any,
) -> Tensor:  # fmt: skip
    """As fast_cross_entropy_loss: the backward pass writes the gradient over the logits."""
    refuse("unsloth", options, ignore_index=IGNORE_INDEX, label_smoothing=0.0, z_loss=0.0)
    scale = 0 if logit_scale == 1.0 else logit_scale  # 0 means none
    if reduction == "none":
        return _losses.apply(logits, labels, softcap, scale)
    divisor = 1 if reduction == "sum" and num_items is None else num_items
    return _loss(logits[None], labels[None], softcap, scale, divisor)


@operation
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, logit_scale: float = 1.0,
    softcap: float = 0.0, reduction: str = "mean", num_items: Any = None, ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    """As unsloth_fused_ce_loss without a trainer: gradients in the forward pass, chunks sized by free memory."""
    refuse("unsloth", options, z_loss=0.0)
    if reduction == "none":
        raise NotImplementedError("reduction: got 'none'; allowed with unsloth: mean, sum")
    return _linear_loss(
        None,
        hidden[None],
        weight,
        bias,
        labels[None],
        n_items=1 if reduction == "sum" and num_items is None else num_items,
        shift_labels=False,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        logit_scale_multiply=0 if logit_scale == 1.0 else logit_scale,  # 0 means none
        logit_softcapping=softcap,
    )


@cache
def _code(device: torch.device) -> Tensor:
    """The 16 values of 4 bits."""
    return torch.tensor(CODE, device=device)


@operation
def nf4_dequantize(
    packed: Tensor, absmax: Tensor, nested_code: Any = None, nested_absmax: Any = None, nested_offset: Any = None, *,
    shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As fast_dequantize, which takes a QuantState of bitsandbytes with nested scales."""
    if nested_code is None:
        raise NotImplementedError("nested_code: got None; allowed with unsloth: nested scales")
    if dtype == torch.float32:
        raise NotImplementedError("dtype: got torch.float32; allowed with unsloth: torch.float16, torch.bfloat16")
    nested = SimpleNamespace(absmax=nested_absmax, code=nested_code, blocksize=NF4_GROUP)
    state = SimpleNamespace(
        absmax=absmax,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=NF4_BLOCK,
        code=_code(absmax.device),
        offset=nested_offset,
        state2=nested,
    )
    return _dequantize(packed, state)

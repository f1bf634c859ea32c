"""PyTorch's own operators, without torch.compile: fused where it has a fused one."""

import torch
from torch import Tensor
from torch.nn import functional as F

from unsloth_ref.types import Approximate, Casting, Reduction


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> Tensor:
    """As torch.nn.RMSNorm, which rounds once."""
    if offset or casting != "llama":
        raise NotImplementedError("torch has neither an offset nor another casting")
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
) -> tuple[Tensor, Tensor]:
    """A sum, then torch.nn.RMSNorm."""
    added = x + residual
    return rms_norm(added, weight, eps, offset=offset, casting=casting), added


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As torch.nn.LayerNorm."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As transformers' MLP with SiLU."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """As transformers' MLP with GELU."""
    return F.gelu(gate, approximate=approximate) * up


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """As transformers' loss: in float32; without a valid target the mean is NaN."""
    if logit_scale != 1.0 or softcap or z_loss:
        raise NotImplementedError("torch has neither logit_scale nor softcap nor z_loss")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    how = reduction if num_items is None else "sum"
    loss = F.cross_entropy(
        logits.to(wide), labels, ignore_index=ignore_index, reduction=how, label_smoothing=label_smoothing
    )
    return loss if num_items is None else loss / num_items


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Scaled dot product attention of all tokens at once, under a dense mask of one block a document."""
    if softcap:
        raise NotImplementedError("torch has no softcap")
    position = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    mask = (document == document[:, None]) & (position <= position[:, None])
    if window is not None:
        mask &= position > position[:, None] - window
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Three linear layers and a sum, with adapters of other bits cast to those of x."""
    low = F.linear(x, lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * F.linear(low, lora_b.to(x.dtype))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """A linear layer, then the loss of its logits, whole and in float32."""
    return cross_entropy(
        F.linear(hidden, weight, bias),
        labels,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        num_items=num_items,
    )

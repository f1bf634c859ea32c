"""unsloth; importing it needs a GPU and patches other packages in this process.

Its gated activations are no operations of their own: they exist inside its LoRA blocks alone.
"""

from torch import Tensor

from conformance.peers import kernels
from unsloth_ref.types import Casting, Reduction

_rms_norm, _layer_norm, _rope, _rope_at, _losses, _loss, _linear_loss = kernels(
    "unsloth",
    "unsloth.kernels.rms_layernorm:Fast_RMS_Layernorm",
    "unsloth.kernels.layernorm:Fast_Layernorm",
    "unsloth.kernels.rope_embedding:fast_rope_embedding",
    "unsloth.kernels.rope_embedding:Fast_RoPE_Embedding_QK",
    "unsloth.kernels.cross_entropy_loss:Fast_CrossEntropyLoss",
    "unsloth.kernels.cross_entropy_loss:fast_cross_entropy_loss",
    "unsloth_zoo.fused_losses:unsloth_fused_ce_loss",
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> Tensor:
    """As fast_rms_layernorm."""
    if (offset, casting) not in ((0.0, "llama"), (1.0, "gemma")):
        raise NotImplementedError("unsloth has Llama's norm without an offset and Gemma's with 1 alone")
    return _rms_norm.apply(x, weight, eps, casting == "gemma")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As fast_layernorm."""
    return _layer_norm.apply(x, weight, bias, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As fast_rope_embedding: q and k are rotated in place where they lie as it wants them."""
    if positions is not None:
        return _rope_at.apply(q, k, cos, sin, positions)
    if cos.shape[0] != 1:
        raise NotImplementedError("unsloth has the same positions in every sequence, or a table with positions")
    return _rope(q, k, cos, sin)


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
    """As fast_cross_entropy_loss: the backward pass writes the gradient over the logits."""
    if ignore_index != -100 or label_smoothing or z_loss:
        raise NotImplementedError("unsloth has neither another ignore_index nor label_smoothing nor z_loss")
    scale = 0 if logit_scale == 1.0 else logit_scale  # 0 stands for none
    if reduction == "none":
        return _losses.apply(logits, labels, softcap, scale)
    return _loss(
        logits[None], labels[None], softcap, scale, 1 if reduction == "sum" and num_items is None else num_items
    )


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
    """As unsloth_fused_ce_loss without a trainer: gradients in the forward pass, chunks by the memory that is free."""
    if z_loss or reduction == "none":
        raise NotImplementedError("unsloth has neither z_loss nor the losses of rows")
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
        logit_scale_multiply=0 if logit_scale == 1.0 else logit_scale,  # 0 stands for none
        logit_softcapping=softcap,
    )

"""liger-kernel."""

from torch import Tensor

from conformance.peers import kernels
from unsloth_ref.types import Approximate, Casting, Reduction

_rms_norm, _add_rms_norm, _layer_norm, _rope, _swiglu, _geglu, _cross_entropy, _linear_cross_entropy = kernels(
    "liger-kernel",
    "liger_kernel.ops.rms_norm:LigerRMSNormFunction",
    "liger_kernel.ops.fused_add_rms_norm:LigerFusedAddRMSNormFunction",
    "liger_kernel.ops.layer_norm:LigerLayerNormFunction",
    "liger_kernel.ops.rope:LigerRopeFunction",
    "liger_kernel.ops.swiglu:LigerSiLUMulFunction",
    "liger_kernel.ops.geglu:LigerGELUMulFunction",
    "liger_kernel.ops.cross_entropy:LigerCrossEntropyFunction",
    "liger_kernel.transformers.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyLoss",
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> Tensor:
    """As LigerRMSNorm: the backward pass writes over grad_output."""
    return _rms_norm.apply(x, weight, eps, offset, casting, True)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
) -> tuple[Tensor, Tensor]:
    """As LigerFusedAddRMSNorm."""
    return _add_rms_norm.apply(x, residual, weight, eps, offset, casting, False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As LigerLayerNorm."""
    return _layer_norm.apply(x, weight, bias, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As liger_rotary_pos_emb: both passes write over what they are given, where it lies as they want it."""
    if positions is not None:
        raise NotImplementedError("liger-kernel takes no table with positions")
    return _rope.apply(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As LigerSwiGLUMLP: the backward pass writes over gate and up."""
    return _swiglu.apply(gate, up)


def geglu(gate: Tensor, up: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """As LigerGEGLUMLP: the backward pass writes over gate and up."""
    if approximate != "tanh":
        raise NotImplementedError("liger-kernel has the approximation by tanh alone")
    return _geglu.apply(gate, up)


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
    """As LigerCrossEntropyLoss: the forward pass writes the gradient over the logits."""
    if logit_scale != 1.0 or num_items is not None:
        raise NotImplementedError("liger-kernel has neither logit_scale nor num_items")
    found = _cross_entropy.apply(
        logits, labels, None, ignore_index, z_loss, label_smoothing, reduction, softcap or None
    )
    return found[0]


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
    """As LigerFusedLinearCrossEntropyLoss: gradients in the forward pass, that of weight added up in its own dtype."""
    if logit_scale != 1.0 or num_items is not None:
        raise NotImplementedError("liger-kernel has neither logit_scale nor num_items")
    loss = _linear_cross_entropy(
        ignore_index=ignore_index,
        lse_square_scale=z_loss,
        label_smoothing=label_smoothing,
        reduction=reduction,
        softcap=softcap or None,
    )
    return loss(weight, hidden, labels, bias)

"""liger-kernel."""

from typing import Any

from torch import Tensor

from conformance.peers import import_kernels, operation, refuse
from unsloth_ref.types import IGNORE_INDEX

_rms_norm, _add_rms_norm, _layer_norm, _rope, _swiglu, _geglu, _cross_entropy, _linear_cross_entropy = import_kernels(
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


@operation
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama") -> Tensor:
    """As LigerRMSNorm: the backward pass writes over grad_output."""
    return _rms_norm.apply(x, weight, eps, offset, casting, True)


@operation
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> tuple[Tensor, Tensor]:
    """As LigerFusedAddRMSNorm."""
    return _add_rms_norm.apply(x, residual, weight, eps, offset, casting, False)


@operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As LigerLayerNorm."""
    return _layer_norm.apply(x, weight, bias, eps)


@operation
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """As liger_rotary_pos_emb: both passes write over their inputs where these have the layout that it needs."""
    refuse("liger-kernel", options, interleaved=False)
    if positions is not None:
        raise NotImplementedError("positions: got a tensor; allowed with liger-kernel: None")
    return _rope.apply(q, k, cos, sin)


@operation
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As LigerSwiGLUMLP: the backward pass writes over gate and up."""
    return _swiglu.apply(gate, up)


@operation
def fused_swiglu(gate_up: Tensor, *, interleaved: bool = False, **options: Any) -> Tensor:
    """As LigerPhi3SwiGLUMLP: its swiglu of the halves, over which the backward pass writes."""
    refuse(
        "liger-kernel", {"interleaved": interleaved, **options}, interleaved=False, alpha=1.0, limit=None, offset=0.0
    )
    return _swiglu.apply(*gate_up.chunk(2, dim=-1))


@operation
def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """As LigerGEGLUMLP: the backward pass writes over gate and up."""
    refuse("liger-kernel", {"approximate": approximate}, approximate="tanh")
    return _geglu.apply(gate, up)


@operation
def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, softcap: float = 0.0,
    label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean", **options: Any,
) -> Tensor:  # fmt: skip
    """As LigerCrossEntropyLoss: the forward pass writes the gradient over the logits."""
    refuse("liger-kernel", options, logit_scale=1.0, num_items=None)
    cap = softcap or None
    return _cross_entropy.apply(logits, labels, None, ignore_index, z_loss, label_smoothing, reduction, cap)[0]


@operation
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean", softcap: float = 0.0, label_smoothing: float = 0.0, z_loss: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    """As LigerFusedLinearCrossEntropyLoss: gradients in the forward pass, weight's summed in weight's dtype."""
    refuse("liger-kernel", options, logit_scale=1.0, num_items=None)
    loss = _linear_cross_entropy(
        ignore_index=ignore_index,
        lse_square_scale=z_loss,
        label_smoothing=label_smoothing,
        reduction=reduction,
        softcap=softcap or None,
    )
    return loss(weight, hidden, labels, bias)

"""The code that the world trains with, as backends: modules of transformers, and torch's own operators.

A fair judge passes all of it. Each backend is an object, such as `tests.judge.world.llama`. A module keeps its own
forward method; around it are the contract's checks and the options that the module lacks.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ReLUSquaredActivation
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from tests.judge.contract import Function, as_backend
from unsloth_ref import checks


class _Norm:
    """What the forward methods of the norms read; they are called without a module, whose weight would be a copy."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps, self.variance_epsilon = weight, eps, eps

    def _norm(self, x: Tensor) -> Tensor:
        return GemmaRMSNorm._norm(self, x)  # type: ignore[arg-type]


class _Gated:
    """What the forward method of an MLP reads, without its three linear layers."""

    def __init__(self, gate: Tensor, up: Tensor, activation: Function) -> None:
        self._gate, self._up, self.act_fn = gate, up, activation

    def gate_proj(self, x: None) -> Tensor:
        return self._gate

    def up_proj(self, x: None) -> Tensor:
        return self._up

    def down_proj(self, y: Tensor) -> Tensor:
        return y


class _Fused:
    """What the methods of fused MLPs read. A namespace would do, but torch.compile traces none."""

    def __init__(self, alpha: float = 1.0, limit: float | None = None) -> None:
        self.alpha, self.limit = alpha, limit

    def gate_up_proj(self, x: Tensor) -> Tensor:
        return x

    def activation_fn(self, gate: Tensor) -> Tensor:
        return F.silu(gate)

    def down_proj(self, y: Tensor) -> Tensor:
        return y


def _norm(module: Any) -> Function:
    """A norm that rounds before it multiplies; under casting="gemma" and offset=1 Gemma's, which rounds once."""

    def rms_norm(
        x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
    ) -> Tensor:
        checks.norm_arguments(x, weight, eps)
        checks.one_of("casting", casting, ("llama", "gemma"))
        if casting == "gemma" and offset == 1:
            return GemmaRMSNorm.forward(_Norm(weight, eps), x)  # type: ignore[arg-type]
        stored = weight.float() + offset if offset else weight
        return module.forward(_Norm(stored, eps), x.float() if casting == "gemma" else x).to(x.dtype)

    return rms_norm


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, group_size: int | None = None,
    norm_before_gate: bool = True, casting: str = "llama",
) -> Tensor:  # fmt: skip
    """Falcon-H1's for "gemma" casting; group by group, Mamba 2's for a gate before the norm, Qwen3-Next's otherwise."""
    checks.gated_norm_arguments(x, gate, weight, eps, group_size)
    checks.one_of("casting", casting, ("llama", "gemma"))
    size = group_size or x.shape[-1]
    own: Any = _Norm(weight, eps)
    own.group_size, own.activation, own.norm_before_gate, own.n_groups = size, "silu", norm_before_gate, 1
    if casting == "gemma":
        own.n_groups = x.shape[-1] // max(1, size)
        rows, gates = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, gate))
        return FalconH1RMSNormGated.forward(own, rows, gates).view(x.shape)
    own.weight = weight.view(-1, size)
    rows, gates = (tensor.unflatten(-1, (-1, size)) for tensor in (x, gate))
    module: Any = Qwen3NextRMSNormGated if norm_before_gate else MambaRMSNormGated  # whose own groups came in a release
    return module.forward(own, rows, gates).flatten(-2).to(x.dtype)


def llama_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """LlamaMLP."""
    checks.gated_arguments(gate, up)
    return LlamaMLP.forward(_Gated(gate, up, F.silu), None)  # type: ignore[arg-type]


def gpt_oss_fused_swiglu(
    gate_up: Tensor, *, interleaved: bool = False, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0
) -> Tensor:
    """GptOssExperts for interleaved columns, an offset of 1 and a limit; without options Phi3MLP; else as the former.

    A limit of infinity is not the same as none: the gradient of a clamped NaN is 0.
    """
    checks.fused_gated_arguments(gate_up, alpha, limit, offset)
    if (interleaved, offset) == (True, 1.0) and limit is not None:
        return GptOssExperts._apply_gate(_Fused(alpha, limit), gate_up)  # type: ignore[arg-type]
    if (interleaved, alpha, limit, offset) == (False, 1.0, None, 0.0):
        return Phi3MLP.forward(_Fused(), gate_up)  # type: ignore[arg-type]
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + offset) * (gate * torch.sigmoid(gate * alpha))


def gemma_geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """GemmaMLP."""
    checks.gated_arguments(gate, up)
    return GemmaMLP.forward(_Gated(gate, up, partial(F.gelu, approximate=approximate)), None)  # type: ignore[arg-type]


def nemotron_relu_squared(x: Tensor) -> Tensor:
    """The "relu2" of transformers."""
    checks.has_rows("x", x)
    checks.dtype("x", x)
    return ReLUSquaredActivation.forward(None, x)  # type: ignore[arg-type]


def in_halves(x: Tensor, width: int) -> Tensor:
    """The even columns of the first `width`, then the odd ones, then the rest."""
    return torch.cat([x[..., 0:width:2], x[..., 1:width:2], x[..., width:]], -1)


def in_pairs(x: Tensor, width: int) -> Tensor:
    """The inverse of `in_halves`."""
    halves = x[..., :width].unflatten(-1, (2, width // 2))
    return torch.cat([halves.transpose(-1, -2).flatten(-2), x[..., width:]], -1)


def llama_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb; columns that are not rotated go around it, as in Phi and GPT-NeoX."""
    checks.rope_arguments(q, k, cos, sin, positions)
    if positions is not None:
        if checks.values_are_checked(positions):
            checks.positions_in_table(positions, len(cos))
        cos, sin = cos[positions.long()], sin[positions.long()]
    width = cos.shape[-1]
    with torch.autocast(q.device.type, enabled=False):  # a CPU's autocast does not allow float16 here
        q, k = (in_halves(x, width) if interleaved else x for x in (q, k))
        turned = apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin)
        turned_q, turned_k = (
            torch.cat([rotated.to(x.dtype), x[..., width:]], -1) for rotated, x in zip(turned, (q, k), strict=True)
        )
        turned_q, turned_k = (in_pairs(x, width) if interleaved else x for x in (turned_q, turned_k))
    return turned_q, turned_k


def qwen3_qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None = None, *, eps: float = 1e-6, offset: float = 0.0, casting: str = "llama",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Qwen3RMSNorm of the heads, or Gemma's, then apply_rotary_pos_emb."""
    checks.head_norm_arguments(q, k, q_weight, k_weight, cos, sin, positions, eps)
    norm = _norm(Qwen3RMSNorm)
    q, k = (norm(x, w, eps, offset=offset, casting=casting) for x, w in ((q, q_weight), (k, k_weight)))
    return llama_rope(q, k, cos, sin, positions)


def torch_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """torch.nn.RMSNorm, which rounds once; with an offset in float32."""
    checks.norm_arguments(x, weight, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    if offset:
        return F.rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """torch.nn.LayerNorm; on a CPU in float32, for there it sums the gradients of the weight row by row in 16 bits."""
    checks.norm_arguments(x, weight, eps)
    checks.column_vector("bias", bias, "x", x)
    if x.is_cuda and weight.dtype == bias.dtype == x.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return (F.layer_norm(x.float(), weight.shape, eps=eps) * weight.float() + bias.float()).to(x.dtype)


def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """torch's silu, then a product."""
    checks.gated_arguments(gate, up)
    return F.silu(gate) * up


def _backend(**functions: Function) -> SimpleNamespace:
    return SimpleNamespace(**{op: getattr(as_backend(op, function), op) for op, function in functions.items()})


llama = _backend(rms_norm=_norm(LlamaRMSNorm), swiglu=llama_swiglu, rope=llama_rope, geglu=gemma_geglu)
gated = _backend(gated_rms_norm=gated_rms_norm)
gpt_oss = _backend(fused_swiglu=gpt_oss_fused_swiglu)
nemotron = _backend(relu_squared=nemotron_relu_squared)
qwen3 = _backend(rms_norm=_norm(Qwen3RMSNorm), qk_norm_rope=qwen3_qk_norm_rope)
torch_operators = _backend(rms_norm=torch_rms_norm, layer_norm=torch_layer_norm, swiglu=torch_swiglu)

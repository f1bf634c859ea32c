"""PyTorch's own operators without torch.compile, fused where PyTorch has a fused one."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.peers import operation, refuse
from unsloth_ref import document_checks
from unsloth_ref.types import IGNORE_INDEX, QuantisedWeight


@operation
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama") -> Tensor:
    """As torch.nn.RMSNorm, which rounds once."""
    if offset or casting != "llama":
        raise NotImplementedError(f"got offset={offset}, casting={casting!r}; allowed with torch: 0.0, 'llama'")
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@operation
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, **options: Any
) -> tuple[Tensor, Tensor]:
    """A sum, then torch.nn.RMSNorm."""
    added = x + residual
    return rms_norm(added, weight, eps, **options), added


@operation
def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, group_size: int | None = None,
    norm_before_gate: bool = True, casting: str = "llama",
) -> Tensor:  # fmt: skip
    """torch.nn.RMSNorm of each group; SiLU and its product are rounded."""
    factor, size = F.silu(gate), group_size or x.shape[-1]
    groups = (x if norm_before_gate else x * factor).unflatten(-1, (-1, size))
    normed = F.rms_norm(groups, (size,), None, eps).flatten(-2) * weight
    return normed * factor if norm_before_gate else normed


@operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """As torch.nn.LayerNorm."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@operation
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As transformers' MLP with SiLU."""
    return F.silu(gate) * up


@operation
def fused_swiglu(
    gate_up: Tensor, *, interleaved: bool = False, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0
) -> Tensor:
    """As transformers' MLPs with one projection for gate and up."""
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(gate * alpha)) * (up + offset if offset else up)


@operation
def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """As transformers' MLP with GELU."""
    return F.gelu(gate, approximate=approximate) * up


@operation
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None = None, *, eps: float = 1e-6, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch.nn.RMSNorm of the heads, then transformers' apply_rotary_pos_emb."""
    refuse("torch", options, offset=0.0, casting="llama")
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    width = cos.shape[-1]

    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], weight, eps)
        first, second = x[..., :width].chunk(2, -1)
        y = x[..., :width] * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        return torch.cat([y.to(x.dtype), x[..., width:]], -1) if width < x.shape[-1] else y.to(x.dtype)

    return rotated(q, q_weight), rotated(k, k_weight)


@operation
def relu_squared(x: Tensor) -> Tensor:
    """As transformers' ReLUSquaredActivation."""
    return F.relu(x).square()


@operation
def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0,
    reduction: str = "mean", num_items: Any = None, **options: Any,
) -> Tensor:  # fmt: skip
    """As transformers' loss: in float32; without a valid target the mean is NaN."""
    refuse("torch", options, logit_scale=1.0, softcap=0.0, z_loss=0.0)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    how = reduction if num_items is None else "sum"
    loss = F.cross_entropy(
        logits.to(wide), labels, ignore_index=ignore_index, reduction=how, label_smoothing=label_smoothing
    )
    return loss if num_items is None else loss / num_items


@operation
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """A linear layer, then the loss of all its logits at once, in float32."""
    return cross_entropy(F.linear(hidden, weight, bias), labels, **options)


@operation
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
    scale: float | None = None, window: int | None = None, sinks: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Scaled dot product attention of all tokens at once, under a dense mask with one block per document.

    Sinks are the scores of one more key, whose value is 0.
    """
    refuse("torch", options, softcap=0.0)
    position = torch.arange(len(q), device=q.device)
    document = document_checks.document_of(cu_seqlens, position)
    mask = (document == document[:, None]) & (position <= position[:, None])
    if window is not None:
        mask &= position > position[:, None] - window
    if sinks is not None:
        k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (k, v))
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
        column = sinks.to(q.dtype)[:, None, None].expand(-1, len(q), 1)
        mask = torch.cat([bias.expand(len(sinks), -1, -1), column], -1)
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@operation
def causal_conv(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """A depthwise convolution of each document, then SiLU."""
    taps, parts = weight[:, None].to(x.dtype), [x[:0]]
    for begin, end in pairwise(cu_seqlens.tolist()):
        if begin < end:
            padded = F.pad(x[begin:end].t(), (weight.shape[1] - 1, 0))
            parts.append(F.conv1d(padded, taps, None if bias is None else bias.to(x.dtype), groups=len(weight)).t())
    z = torch.cat(parts)
    return F.silu(z) if activation == "silu" else z


@operation
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, *, scale: float | None = None
) -> Tensor:
    """In chunks of 64 tokens of each document, by float32 products and triangular solutions, as transformers."""
    group, factor = v.shape[1] // q.shape[1], q.shape[2] ** -0.5 if scale is None else scale
    q, k = (heads.repeat_interleave(group, 1) for heads in (q, k))
    parts = [v[:0].float()]
    for begin, end in pairwise(cu_seqlens.tolist()):
        if begin < end:
            rows = (x[begin:end].float().transpose(0, 1) for x in (q, k, v, g[..., None], beta[..., None]))
            parts.append(factor * _delta_rule_of_document(*rows).transpose(0, 1))
    return torch.cat(parts).to(v.dtype)


def _delta_rule_of_document(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Of one document [M, L, ...]; rows of zeros complete its last chunk."""
    length = q.shape[1]
    q, k, v, g, beta = (F.pad(x, (0, 0, 0, -length % 64)).unflatten(1, (-1, 64)) for x in (q, k, v, g, beta))
    total = g.cumsum(2)
    lower = torch.ones(64, 64, dtype=torch.bool, device=q.device).tril()
    between = (total - total.mT).masked_fill(~lower, float("-inf")).exp()
    system = beta * between * (k @ k.mT)
    solve = partial(torch.linalg.solve_triangular, system, upper=False, unitriangular=True)
    values, reads, weights = solve(beta * v), solve(beta * total.exp() * k), between * (q @ k.mT)
    until, after = total.exp() * q, (total[:, :, -1:] - total).exp() * k
    state, rows = q.new_zeros(len(q), q.shape[3], v.shape[3]), []
    for chunk in range(q.shape[1]):
        u = values[:, chunk] - reads[:, chunk] @ state
        rows.append(until[:, chunk] @ state + weights[:, chunk] @ u)
        state = total[:, chunk, -1:].exp() * state + after[:, chunk].mT @ u
    return torch.cat(rows, 1)[:, :length]


@operation
def lora_linear(
    x: Tensor, weight: Tensor | QuantisedWeight, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Three linear layers and a sum; adapters of another dtype are cast to that of x. No quantised weights."""
    if isinstance(weight, QuantisedWeight):
        raise NotImplementedError(f"weight: got {type(weight).__name__}; allowed with torch: a Tensor")
    low = F.linear(x, lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * F.linear(low, lora_b.to(x.dtype))


@operation
def lora_linears(
    x: Tensor, weight: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scaling: Sequence[float] | None = None, bias: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Layer by layer."""
    count = len(weight)
    layers = zip(weight, lora_a, lora_b, scaling or [1.0] * count, bias or [None] * count, strict=True)
    return tuple(lora_linear(x, *layer) for layer in layers)


@operation
def grouped_gemm(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """torch's grouped product."""
    return F.grouped_mm(x, weight.mT, offs=group_sizes.cumsum(0, dtype=torch.int32))


@operation
def moe_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_indices: Tensor, expert_weights: Tensor,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, *, activation: str = "silu",
    interleaved: bool = False, alpha: float = 1.0, limit: float | None = None, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Slots sorted by their expert, and torch's grouped products, with every option of the contract."""
    slots, order = expert_indices.flatten().sort(stable=True)
    ends = torch.searchsorted(slots, torch.arange(len(gate_up), device=x.device), right=True).int()
    z = F.grouped_mm(x[order // expert_indices.shape[1]], gate_up.mT, offs=ends)
    z = z if gate_up_bias is None else z + gate_up_bias[slots]
    gate, up = (z[:, ::2], z[:, 1::2]) if interleaved else z.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "silu":
        a = F.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(gate * alpha)
    else:
        a = F.gelu(gate, approximate="tanh")
    out = F.grouped_mm(a * (up + offset if offset else up), down.mT, offs=ends)
    out = (out if down_bias is None else out + down_bias[slots]) * expert_weights.flatten()[order, None]
    return out[order.argsort()].unflatten(0, expert_indices.shape).sum(1).to(x.dtype)


@operation
def fp8_quantize(x: Tensor, block_rows: int = 128) -> tuple[Tensor, Tensor]:
    """Blocks of a padded matrix, times the reciprocal of their scales."""
    (rows, columns), height = x.shape, block_rows
    padded = F.pad(x.detach().float(), (0, -columns % 128, 0, -rows % height))
    tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // 128, 128)
    largest = tiles.abs().amax((1, 3), keepdim=True) if x.numel() else tiles[:, :1, :, :1]
    scale = torch.where(largest == 0, 1.0, (largest / 448).clamp(min=2.0**-126))
    values = (tiles * (1 / scale)).clamp(-448, 448).view(padded.shape)[:rows, :columns].contiguous()
    return values.to(torch.float8_e4m3fn), scale[:, 0, :, 0].contiguous()


@operation
def fp8_dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product with the scale of each element."""
    rows, columns = values.shape
    by_row = scale if len(scale) == rows else scale.repeat_interleave(128, 0)[:rows]
    return (values.float() * by_row.detach().repeat_interleave(128, 1)[:, :columns]).to(dtype)


@operation
def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of the dequantised weight."""
    return F.linear(x, fp8_dequantize(weight, scale, x.dtype), bias)

"""Right implementations that differ in order, tiles, precision or means: a fair judge passes them all.

Each is a backend: `tests.meta.right.rms_norm_of_torch`.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.meta.contract import Function, as_backend
from tests.meta.sources import Edit, changed
from unsloth_ref import checks
from unsloth_ref import kernels as reference

RIGHT: dict[str, str] = {}  # by name: operation


def right(op: str) -> Callable[[Function], SimpleNamespace]:
    """Make a function a backend."""

    def register(function: Function) -> SimpleNamespace:
        RIGHT[function.__name__] = op
        return as_backend(op, function)

    return register


@right("rms_norm")
def rms_norm_of_transformers(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """In the order of transformers' LlamaRMSNorm and GemmaRMSNorm."""
    checks.norm_arguments(x, weight, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "gemma":
        return (normed * (offset + weight.float())).type_as(x)
    return normed.to(x.dtype) * weight if offset == 0 else (normed.to(x.dtype) * (offset + weight.float())).to(x.dtype)


@right("rms_norm")
def rms_norm_of_torch(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """torch's own operator, which rounds once."""
    checks.norm_arguments(x, weight, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    return F.rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)


def _in_two_levels(values: Tensor) -> Tensor:
    """Sums of 64 columns, then the sum of those."""
    padded = F.pad(values, (0, -values.shape[-1] % 64))
    return padded.unflatten(-1, (-1, 64)).sum(-1).sum(-1, keepdim=True)


@right("rms_norm")
def rms_norm_in_two_levels(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """Another order of summation."""
    checks.norm_arguments(x, weight, eps)
    checks.one_of("casting", casting, ("llama", "gemma"))
    wide = x.float()
    normed = wide / torch.sqrt(_in_two_levels(wide.square()) / max(x.shape[-1], 1) + eps)
    if casting == "llama":
        normed = normed.to(x.dtype).float()
    return (normed * (weight.float() + offset)).to(x.dtype)


@right("rms_norm")
def rms_norm_in_float64(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
    """More exact than asked."""
    checks.dtype("x", x)
    return reference.rms_norm(x.double(), weight.double(), *others, **options).to(x.dtype)


def _add_rms_norm(normalise: Function) -> Function:
    """The contract around a norm in float32 of the sum: checks, the offset, the roundings of casting."""

    def add_rms_norm(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        casting: str = "llama",
    ) -> tuple[Tensor, Tensor]:
        checks.norm_arguments(x, weight, eps)
        checks.same("residual", residual, "x", x)
        checks.one_of("casting", casting, ("llama", "gemma"))
        total = x + residual
        normed = normalise(x, residual, total, eps)
        if casting == "llama":
            normed = normed.to(x.dtype).float()
        return (normed * (weight.float() + offset)).to(x.dtype), total

    add_rms_norm.__name__ = normalise.__name__
    return add_rms_norm


@right("add_rms_norm")
@_add_rms_norm
def add_rms_norm_of_torch(x: Tensor, residual: Tensor, total: Tensor, eps: float) -> Tensor:
    """torch's own operator; the gradients of both outputs meet in the dtype of x."""
    return F.rms_norm(total.float(), total.shape[-1:], None, eps)


@right("add_rms_norm")
@_add_rms_norm
def add_rms_norm_in_two_levels(x: Tensor, residual: Tensor, total: Tensor, eps: float) -> Tensor:
    """Another order of summation."""
    wide = total.float()
    return wide / torch.sqrt(_in_two_levels(wide.square()) / max(x.shape[-1], 1) + eps)


@right("add_rms_norm")
@_add_rms_norm
def add_rms_norm_of_the_exact_sum(x: Tensor, residual: Tensor, total: Tensor, eps: float) -> Tensor:
    """What is normalised has not been rounded yet."""
    wide = x.float() + residual.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


@right("add_rms_norm")
def add_rms_norm_in_float64(
    x: Tensor, residual: Tensor, weight: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """More exact than asked."""
    checks.norm_arguments(x, weight, 0.0)
    checks.same("residual", residual, "x", x)
    normed, total = reference.add_rms_norm(x.double(), residual.double(), weight.double(), *others, **options)
    return normed.to(x.dtype), total.to(x.dtype)


@right("layer_norm")
def layer_norm_of_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """torch's own operator, in float32; weight and bias apart, whose gradients it adds up row after row on a CPU."""
    checks.norm_arguments(x, weight, eps)
    checks.column_vector("bias", bias, "x", x)
    return (F.layer_norm(x.float(), weight.shape, eps=eps) * weight.float() + bias.float()).to(x.dtype)


@right("layer_norm")
def layer_norm_in_two_levels(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Another order of summation, and the mean of g times the deviation instead of a gradient through the mean."""
    checks.norm_arguments(x, weight, eps)
    checks.column_vector("bias", bias, "x", x)
    wide, columns = x.float(), max(x.shape[-1], 1)
    centred = wide - _in_two_levels(wide) / columns
    normed = centred / torch.sqrt(_in_two_levels(centred.square()) / columns + eps)
    return (normed * weight.float() + bias.float()).to(x.dtype)


@right("layer_norm")
def layer_norm_in_float64(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """More exact than asked."""
    checks.norm_arguments(x, weight, eps)
    return reference.layer_norm(x.double(), weight.double(), bias.double(), eps).to(x.dtype)


@right("swiglu")
def swiglu_by_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
    """In float32, rounded once."""
    checks.gated_arguments(gate, up)
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)


@right("swiglu")
def swiglu_by_exp(gate: Tensor, up: Tensor) -> Tensor:
    """A quotient of exponentials that cannot overflow; gate times up comes first."""
    checks.gated_arguments(gate, up)
    wide = gate.float()
    small = torch.exp(-wide.abs())
    return (wide * up.float() * torch.where(wide < 0, small, 1.0) / (1 + small)).to(gate.dtype)


@right("swiglu")
def swiglu_in_float64(gate: Tensor, up: Tensor) -> Tensor:
    """More exact than asked."""
    checks.gated_arguments(gate, up)
    return reference.swiglu(gate.double(), up.double()).to(gate.dtype)


@right("geglu")
def geglu_by_erfc(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """Without cancellation, in float32, rounded once."""
    checks.gated_arguments(gate, up)
    checks.one_of("approximate", approximate, ("none", "tanh"))
    wide = gate.float()
    twice = 2 * math.sqrt(2 / math.pi) * wide * (1 + 0.044715 * wide * wide)
    share = torch.sigmoid(twice) if approximate == "tanh" else torch.special.erfc(-wide / math.sqrt(2)) / 2
    return (wide * share * up.float()).to(gate.dtype)


@right("geglu")
def geglu_by_erf(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """As the formulas are written, with their cancellation; up comes first."""
    checks.gated_arguments(gate, up)
    checks.one_of("approximate", approximate, ("none", "tanh"))
    wide = gate.float()
    z = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    odd = torch.tanh(z) if approximate == "tanh" else torch.erf(wide / math.sqrt(2))
    return (0.5 * wide * up.float() * (1 + odd)).to(gate.dtype)


@right("geglu")
def geglu_in_float64(gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """More exact than asked."""
    checks.gated_arguments(gate, up)
    return reference.geglu(gate.double(), up.double(), approximate=approximate).to(gate.dtype)


def _with_rope_checks(rotate: Function) -> Function:
    """The contract around cos and sin of each token: checks, rows of the table."""

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.rope_arguments(q, k, cos, sin, positions)
        if positions is not None:
            if checks.must_read_labels(positions):
                checks.positions_in_table(positions, len(cos))
            cos, sin = cos[positions.long()], sin[positions.long()]
        return rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])

    rope.__name__ = rotate.__name__
    return rope


@right("rope")
@_with_rope_checks
def rope_of_transformers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By rotate_half; what does not turn goes through a product with 1."""
    rest = x.shape[-1] - cos.shape[-1]
    first, second = x[..., : cos.shape[-1] // 2], x[..., cos.shape[-1] // 2 : cos.shape[-1]]
    with torch.autocast(x.device.type, enabled=False):  # to which a CPU's takes no float16
        other = torch.cat((-second, first, torch.zeros_like(x[..., cos.shape[-1] :])), -1)
    return (x * F.pad(cos, (0, rest), value=1.0) + other * F.pad(sin, (0, rest))).to(x.dtype)


@right("rope")
@_with_rope_checks
def rope_by_fused_products(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float32, rounded once, half by half."""
    half = cos.shape[-1] // 2
    first, second = x[..., : 2 * half].float().chunk(2, -1)
    (cos1, cos2), (sin1, sin2) = cos.float().chunk(2, -1), sin.float().chunk(2, -1)
    y = x.clone()
    y[..., :half] = torch.addcmul(first * cos1, second, sin1, value=-1.0).to(x.dtype)
    y[..., half : 2 * half] = torch.addcmul(second * cos2, first, sin2).to(x.dtype)
    return y


@right("rope")
def rope_in_float64(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """More exact than asked."""
    checks.rope_arguments(q, k, cos, sin, positions)
    turned_q, turned_k = reference.rope(q.double(), k.double(), cos.double(), sin.double(), positions)
    return turned_q.to(q.dtype), turned_k.to(q.dtype)


def _reduced(losses: Tensor, counts: Tensor, reduction: str, num_items: Any) -> Tensor:
    if reduction == "none":
        return losses
    count = num_items if num_items is not None else counts.sum() if reduction == "mean" else 1
    return losses.sum() / torch.as_tensor(count, dtype=losses.dtype).clamp(min=1)


def _cross_entropy(rowwise: Function) -> Function:
    """The contract around the losses of rows: checks, options on the logits, ignored rows, the reduction."""

    def cross_entropy(
        logits: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        num_items: Any = None,
    ) -> Tensor:
        checks.loss_arguments(logits, labels, softcap, label_smoothing, z_loss, reduction, num_items)
        if checks.must_read_labels(labels):
            checks.labels_in_vocabulary(labels, logits.shape[1], ignore_index)
        counts = labels != ignore_index
        z = logits.float().where(counts[:, None], 0.0) * logit_scale
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        losses = rowwise(z, labels.where(counts, 0), label_smoothing, z_loss).where(counts, 0.0)
        return _reduced(losses.to(torch.float32), counts, reduction, num_items)

    cross_entropy.__name__ = rowwise.__name__
    return cross_entropy


@right("cross_entropy")
@_cross_entropy
def cross_entropy_of_torch(z: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """torch's own operator; not its smoothing, whose backward adds label_smoothing / vocab one after the other."""
    losses = F.cross_entropy(z, labels, reduction="none")
    lse = torch.logsumexp(z, -1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - z.mean(-1))
    return losses + z_loss * lse * lse


@right("cross_entropy")
@_cross_entropy
def cross_entropy_in_chunks(z: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """The log-sum-exp of the log-sum-exps of 1000 classes each."""
    lse = torch.logsumexp(torch.stack([torch.logsumexp(chunk, -1) for chunk in z.split(1000, -1)], -1), -1)
    losses = lse - z.gather(1, labels[:, None])[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - z.mean(-1))
    return losses + z_loss * lse * lse


@right("cross_entropy")
def cross_entropy_in_float64(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """More exact than asked."""
    return reference.cross_entropy(logits.double(), labels, **options).float()


def _linear_checks(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Any:
    """The contract's checks; returns which rows count."""
    names = ("softcap", "label_smoothing", "z_loss", "reduction", "num_items")
    defaults = {"softcap": 0.0, "label_smoothing": 0.0, "z_loss": 0.0, "reduction": "mean", "num_items": None}
    checks.linear_loss_arguments(hidden, weight, labels, bias, *({**defaults, **options}[name] for name in names))
    ignore_index = options.get("ignore_index", -100)
    if checks.must_read_labels(labels):
        checks.labels_in_vocabulary(labels, len(weight), ignore_index)
    return labels != ignore_index


@right("linear_cross_entropy")
def linear_cross_entropy_of_torch(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """torch's own operators, one after the other."""
    counts = _linear_checks(hidden, weight, labels, bias, options)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.where(counts[:, None], 0.0), weight, bias)
    return cross_entropy_of_torch.cross_entropy(logits, labels.long(), **options)


@right("linear_cross_entropy")
def linear_cross_entropy_of_wide_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Neither logits nor their gradient are rounded."""
    counts = _linear_checks(hidden, weight, labels, bias, options)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float().where(counts[:, None], 0.0) @ weight.float().t()
        logits = logits if bias is None else logits + bias.float()
    return reference.cross_entropy(logits, labels, **options)


@right("linear_cross_entropy")
def linear_cross_entropy_of_the_rows_that_count(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The others take no part; the bias is added to rounded products."""
    counts = _linear_checks(hidden, weight, labels, bias, options)
    every = counts
    if not torch.compiler.is_compiling():  # in a graph their number must not matter
        hidden, labels, counts = hidden[counts], labels[counts], counts[counts]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.where(counts[:, None], 0.0) @ weight.t()
        logits = logits if bias is None else logits + bias
    found = reference.cross_entropy(logits, labels, **options)
    if options.get("reduction", "mean") != "none" or torch.compiler.is_compiling():
        return found
    return found.new_zeros(every.shape).masked_scatter(every, found)


@right("linear_cross_entropy")
def linear_cross_entropy_in_float64(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """More exact than asked."""
    _linear_checks(hidden, weight, labels, bias, options)
    wide = None if bias is None else bias.double()
    return reference.linear_cross_entropy(hidden.double(), weight.double(), labels, wide, **options).float()


def _packed_attention(attend: Function) -> Function:
    """The contract around one document's values of z and v: checks, documents, grouped heads, what is seen, softcap."""

    def scored(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float) -> Tensor:
        group = q.shape[1] // k.shape[1]
        heads_q, heads_k, heads_v = (x.transpose(0, 1).float() for x in (q, k, v))
        heads_k, heads_v = heads_k.repeat_interleave(group, 0), heads_v.repeat_interleave(group, 0)
        z = heads_q @ heads_k.mT * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return attend(z.masked_fill(~seen, -torch.inf), heads_v).transpose(0, 1).to(q.dtype)

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
        checks.packed_attention_arguments(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        place = torch.arange(len(q), device=q.device)
        seen = (place <= place[:, None]) & (place > place[:, None] - (window or len(q)))
        if torch.compiler.is_compiling():
            document = torch.searchsorted(cu_seqlens[1:], place, right=True)
            with torch.autocast(q.device.type, enabled=False):
                return scored(q, k, v, seen & (document == document[:, None]), scale, softcap)
        checks.documents_fit(cu_seqlens, len(q), max_seqlen)
        parts = [slice(begin, end) for begin, end in pairwise(cu_seqlens.tolist())]
        with torch.autocast(q.device.type, enabled=False):  # whose torch.cat takes no float16 on a CPU
            return torch.cat([scored(q[p], k[p], v[p], seen[p, p], scale, softcap) for p in parts])

    packed_attention.__name__ = attend.__name__
    return packed_attention


@right("packed_attention")
@_packed_attention
def packed_attention_divided_last(z: Tensor, v: Tensor) -> Tensor:
    """The sum of exponentials divides the output, not each of them."""
    weights = torch.exp(z - z.detach().amax(-1, keepdim=True)) if z.numel() else z
    return weights @ v / weights.sum(-1, keepdim=True)


@right("packed_attention")
@_packed_attention
def packed_attention_by_log_sum_exp(z: Tensor, v: Tensor) -> Tensor:
    """The log-sum-exp is taken off before the exponential."""
    return torch.exp(z - torch.logsumexp(z, -1, keepdim=True)) @ v if z.numel() else z @ v


@right("packed_attention")
@_packed_attention
def packed_attention_of_torch(z: Tensor, v: Tensor) -> Tensor:
    """torch's softmax, and the product key by key."""
    return (torch.softmax(z, -1)[..., None] * v[:, None]).sum(2)


@right("packed_attention")
def packed_attention_in_float64(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Tensor:
    """More exact than asked."""
    wide = (x.double() for x in (q, k, v))
    return reference.packed_attention(*wide, cu_seqlens, max_seqlen, **options).to(q.dtype)


def _lora_linear(product: Function) -> Function:
    """The contract around an adapter's layer in no order of its own: checks, autocast left out."""

    def lora_linear(
        x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0, bias: Tensor | None = None
    ) -> Tensor:
        checks.lora_arguments(x, weight, lora_a, lora_b, bias)
        with torch.autocast(x.device.type, enabled=False):
            return product(x, weight, lora_a, lora_b, scaling, bias)

    lora_linear.__name__ = product.__name__
    return lora_linear


@right("lora_linear")
@_lora_linear
def lora_linear_of_peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """What the adapter adds stays in its own dtype."""
    return (F.linear(x, weight, bias) + F.linear(F.linear(x.to(a.dtype), a), b) * scaling).to(x.dtype)


@right("lora_linear")
@_lora_linear
def lora_linear_scaled_first(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """Scaling meets x @ lora_a^T."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a.to(x.dtype)) * scaling, b.to(x.dtype))


@right("lora_linear")
@_lora_linear
def lora_linear_of_the_merged_weight(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """One product, in float32 and rounded once, with what the layer would be after training."""
    merged = weight.float() + scaling * b.float() @ a.float()
    return F.linear(x.float(), merged, None if bias is None else bias.float()).to(x.dtype)


@right("lora_linear")
@_lora_linear
def lora_linear_side_by_side(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """One product of x beside x @ lora_a^T with weight beside lora_b."""
    low = F.linear(x, a.to(x.dtype))
    return F.linear(torch.cat((x, low), -1), torch.cat((weight, scaling * b.to(x.dtype)), 1), bias)


@right("lora_linear")
def lora_linear_in_float64(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """More exact than asked."""
    checks.lora_arguments(x, weight, lora_a, lora_b, bias)
    wide = [t.double() for t in (x, weight, lora_a, lora_b)]
    return reference.lora_linear(*wide, scaling, None if bias is None else bias.double()).to(x.dtype)


TILES: dict[str, tuple[str, tuple[Edit, ...]]] = {
    "rms_norm_in_other_tiles": (
        "rms_norm",
        (
            ("elements=4096, widest=16384, per_thread=32", "elements=8192, widest=8192, per_thread=8"),
            ("elements=4096, widest=8192, per_thread=16", "elements=2048, widest=8192, per_thread=8"),
            ("elements=4096, widest=4096, per_thread=16", "elements=4096, widest=8192, per_thread=4"),
            ("PROGRAMS = 256, 128", "PROGRAMS = 3, 2"),  # so that a program adds up several tiles
        ),
    ),
    "add_rms_norm_in_other_tiles": (
        "add_rms_norm",
        (
            ("elements=4096, widest=16384, per_thread=16", "elements=8192, widest=8192, per_thread=8"),
            ("elements=4096, widest=8192, per_thread=16", "elements=2048, widest=8192, per_thread=8"),
            ("elements=4096, widest=4096, per_thread=16", "elements=4096, widest=8192, per_thread=4"),
            ("PROGRAMS = 256, 128", "PROGRAMS = 3, 2"),
        ),
    ),
    "layer_norm_in_other_tiles": (
        "layer_norm",
        (
            (
                "elements=4096, widest=16384, per_thread=32)\n    launch(\n        layer",
                "elements=8192, widest=8192, per_thread=8)\n    launch(\n        layer",
            ),
            ("elements=4096, widest=8192, per_thread=16", "elements=2048, widest=8192, per_thread=8"),
            ("elements=4096, widest=4096, per_thread=16", "elements=4096, widest=8192, per_thread=4"),
            ("PROGRAMS = 256, 128", "PROGRAMS = 3, 2"),
        ),
    ),
    "swiglu_in_other_tiles": (
        "swiglu",
        (("FORWARD_TILE, BACKWARD_TILE = 1024, 2048", "FORWARD_TILE, BACKWARD_TILE = 8192, 512"),),
    ),
    "geglu_in_other_tiles": (
        "geglu",
        (("FORWARD_TILE, BACKWARD_TILE = 1024, 2048", "FORWARD_TILE, BACKWARD_TILE = 256, 4096"),),
    ),
    "rope_in_other_tiles": (
        "rope",
        (("max(1, 4096 // half)", "max(1, 128 // half)"), ("unit = 8 if half % 8 == 0 else 1", "unit = 1")),
    ),
    "packed_attention_in_other_tiles": (
        "packed_attention",
        (
            ("rows = 32 if width > 128 or (wide and width == 128) else 64", "rows = 32 if wide else 128"),
            ('"COLUMNS": rows, "WIDTH"', '"COLUMNS": 16, "WIDTH"'),
        ),
    ),
    "cross_entropy_in_other_tiles": (
        "cross_entropy",
        (
            ("widest=2048, per_thread=16", "widest=16384, per_thread=8"),
            ("widest=4096, per_thread=16)\n    group", "widest=1024, per_thread=8)\n    group"),
            ("SEGMENT = 20480", "SEGMENT = 8192"),
            ("GROUP = tl.constexpr(8)", "GROUP = tl.constexpr(4)"),
        ),
    ),
    "linear_cross_entropy_in_other_chunks": (
        "linear_cross_entropy",
        (
            ("(4096, 2048, 1536, 1280, 1024, 512, 256, 128)", "(2,)"),  # so that a few rows take several
            ("ROOM = 500 * 2**20", "ROOM = 1"),
        ),
    ),
}
RIGHT |= {name: op for name, (op, _) in TILES.items()}


def __getattr__(name: str) -> ModuleType:
    if name not in TILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = globals()[name] = changed(TILES[name][0], name, TILES[name][1])
    return module

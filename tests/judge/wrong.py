"""Implementations whose formulas are right and whose behaviour is wrong; most wrap the reference.

Each is a backend, such as `tests.judge.wrong.rms_norm_writes_over_x`.
"""

import importlib
import itertools
import os
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import Function, wrong
from unsloth_ref import kernels as reference
from unsloth_ref.types import IGNORE_INDEX


class _Gradient(torch.autograd.Function):
    """The identity, which changes the gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Function) -> Tensor:
        ctx.change = change
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad_output), None


@wrong("rms_norm", "inputs_untouched")
def rms_norm_writes_over_x(x: Tensor, *others: Any, **options: Any) -> Tensor:
    """Writes the result into x, as fused kernels that reuse memory do."""
    y = reference.rms_norm(x.clone(), *others, **options)
    x.detach().copy_(y.detach())
    return y


@wrong("rms_norm", "inputs_untouched")
def rms_norm_writes_over_grad_output(*inputs: Any, **options: Any) -> Tensor:
    """Uses grad_output as scratch memory."""
    return _Gradient.apply(reference.rms_norm(*inputs, **options), lambda gradient: gradient.clone() + gradient.zero_())


@wrong("rms_norm", "signature_parity", contract=False)
def rms_norm_another_default(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """The eps of another model family."""
    return reference.rms_norm(x, weight, eps, offset=offset, casting=casting)


def _added_in_any_order(rows: Tensor) -> Tensor:
    total = torch.zeros_like(rows)
    for row in torch.randperm(len(rows)).tolist():
        total[0] += rows[row]
    return total


@wrong("rms_norm", "determinism")
def rms_norm_sums_in_any_order(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """Sums the gradient of the weight in a random order of rows, as atomics do."""
    normed = reference.rms_norm(x, torch.ones_like(weight), eps, casting=casting)
    scale = _Gradient.apply(weight.expand(len(x), -1), _added_in_any_order) + offset
    return normed * scale


@wrong("rms_norm", "compiles")
def rms_norm_reads_a_value(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
    """Reads its weight first: that waits for the device and breaks the graph."""
    if bool(weight.isinf().any()):
        raise ValueError("weight: got an infinity; allowed: finite numbers")
    return reference.rms_norm(x, weight, *others, **options)


@wrong("rms_norm", "autocast")
def rms_norm_by_matmul(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """Computes the mean as a product with a vector, which autocast computes in 16 bits."""
    mean = x.square() @ x.new_full((x.shape[-1], 1), 1 / x.shape[-1])
    return x * torch.rsqrt(mean + eps) * (weight + offset)


@wrong("add_rms_norm", "inputs_untouched")
def add_rms_norm_adds_in_place(x: Tensor, residual: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Updates the residual stream in place, as inference engines do."""
    normed, total = reference.add_rms_norm(x, residual.clone(), *others, **options)
    residual.detach().copy_(total.detach())
    return normed, total


@wrong("add_rms_norm", "gradients")
def add_rms_norm_detaches_the_sum(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Only the norm has a gradient."""
    normed, total = reference.add_rms_norm(*inputs, **options)
    return normed, total.detach()


@wrong("add_rms_norm", "gradients", "one_at_a_time")
def add_rms_norm_adds_rounded_gradients(x: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Rounds each output's gradient to bfloat16."""
    normed, total = reference.add_rms_norm(x, *others, **options)
    return tuple(_Gradient.apply(y, lambda gradient: gradient.bfloat16().to(x.dtype)) for y in (normed, total))


@wrong("add_rms_norm", "value", "metadata")
def add_rms_norm_the_other_way_round(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns the sum before the norm."""
    return reference.add_rms_norm(*inputs, **options)[::-1]


@wrong("layer_norm", "gradients")
def layer_norm_forgets_the_bias(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The bias gets no gradient."""
    return reference.layer_norm(x, weight, bias.detach(), eps)


@wrong("layer_norm", "signature_parity", contract=False)
def layer_norm_another_order(x: Tensor, bias: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Bias before weight."""
    return reference.layer_norm(x, weight, bias, eps)


@wrong("layer_norm", "argument_kinds", "gradients", dtype="bfloat16")
def layer_norm_rounds_the_normalised_row(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Rounds as Llama's norm does, which the gradient of a float32 weight shows."""
    normed = reference.layer_norm(x, torch.ones_like(weight), torch.zeros_like(bias), eps)
    return (normed.float() * weight.float() + bias.float()).to(x.dtype)


@wrong("layer_norm", "one_at_a_time", "value", dtype="float16")
def layer_norm_mean_in_the_dtype_of_x(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Computes the mean in 16 bits."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.float().square().mean(-1, keepdim=True)
    return (centred.float() * torch.rsqrt(variance + eps) * weight + bias).to(x.dtype)


@wrong("swiglu", "inputs_untouched")
def swiglu_activates_in_place(gate: Tensor, up: Tensor) -> Tensor:
    """Activates the gate in place."""
    y = reference.swiglu(gate.clone(), up)
    F.silu(gate.detach(), inplace=True)
    return y


@wrong("swiglu", "metadata")
def swiglu_returns_the_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Returns the result in the memory of the gate."""
    return torch.Tensor.set_(torch.empty_like(gate), gate.detach()).copy_(reference.swiglu(gate.clone(), up))


@wrong("swiglu", "signature_parity", contract=False)
def swiglu_other_names(x: Tensor, y: Tensor) -> Tensor:
    """Other parameter names, so that keyword arguments fail."""
    return reference.swiglu(x, y)


@wrong("swiglu", "no_grad")
def swiglu_cheaper_without_gradients(gate: Tensor, up: Tensor) -> Tensor:
    """Rounds more often in inference than in training."""
    if torch.is_grad_enabled():
        return reference.swiglu(gate, up)
    return F.silu(gate).bfloat16().to(gate.dtype) * up


CALLS = itertools.count()


@wrong("swiglu", "determinism")
def swiglu_remembers_calls(gate: Tensor, up: Tensor) -> Tensor:
    """The last bit depends on the number of earlier calls."""
    return reference.swiglu(gate, up) * (1 + torch.finfo(gate.dtype).eps * (next(CALLS) % 2))


@wrong("swiglu", "autocast")
def swiglu_half_under_autocast(gate: Tensor, up: Tensor) -> Tensor:
    """Rounds the inputs under autocast."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled(gate.device.type) else gate.dtype
    return reference.swiglu(gate.to(dtype), up.to(dtype)).to(gate.dtype)


@wrong("swiglu", "gradients")
def swiglu_forgets_up(gate: Tensor, up: Tensor) -> Tensor:
    """One input gets no gradient."""
    return reference.swiglu(gate, up.detach())


@wrong("swiglu", "value", dtype="bfloat16")
def swiglu_truncates(gate: Tensor, up: Tensor) -> Tensor:
    """Truncates to bfloat16 instead of rounding; only kernels in Triton's interpreter may, whatever is imported."""
    importlib.import_module("triton")
    y = reference.swiglu(gate.float(), up.float())
    return (y.view(torch.int32) & -(2**16)).view(torch.float32).to(gate.dtype)


@wrong("swiglu", "checkpoint")
def swiglu_drops_some(gate: Tensor, up: Tensor) -> Tensor:
    """Draws numbers from a generator that is not torch's: a recomputation does not repeat them."""
    return reference.swiglu(gate, up) * (1.0 + int.from_bytes(os.urandom(2)) * torch.finfo(gate.dtype).eps)


@wrong("swiglu", "guard_reads")
def swiglu_masks_by_product(gate: Tensor, up: Tensor) -> Tensor:
    """Adds 0 times the number after the gate in memory, which is NaN in no other property's cases."""
    y = reference.swiglu(gate, up)
    if torch.compiler.is_compiling():
        return y
    end = gate.storage_offset() + gate.numel()
    goes_on = end < gate.untyped_storage().nbytes() // gate.element_size()
    return y + 0 * gate.detach().as_strided((), (), end) if goes_on else y


@wrong("swiglu", "layouts")
def swiglu_doubles_the_gradient_of_a_sum(gate: Tensor, up: Tensor) -> Tensor:
    """Doubles a gradient whose strides are all 0."""
    return _Gradient.apply(reference.swiglu(gate, up), lambda gradient: gradient * (1 if any(gradient.stride()) else 2))


@wrong("cross_entropy", "signature_parity", contract=False)
def cross_entropy_without_num_items(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Has fewer keywords than the contract."""
    return reference.cross_entropy(logits, labels, ignore_index=ignore_index)


@wrong("cross_entropy", "inputs_untouched")
def cross_entropy_gradient_over_the_logits(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Overwrites the logits with the gradient, to save memory."""
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reference.cross_entropy(leaf, labels, **options).sum(), leaf)
    loss = reference.cross_entropy(logits.clone(), labels, **options)
    logits.detach().copy_(gradient)
    return loss


@wrong("cross_entropy", "value")
def cross_entropy_of_torch_alone(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    **others: Any,
) -> Tensor:
    """torch's own: NaN without any target, and the options that it lacks have no effect."""
    return F.cross_entropy(
        logits.float(), labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


@wrong("cross_entropy", "metadata", dtype="float16")
def cross_entropy_in_the_dtype_of_the_logits(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Returns a 16-bit loss."""
    return reference.cross_entropy(logits, labels, **options).to(logits.dtype)


@wrong("cross_entropy", "special_values")
def cross_entropy_masks_by_product(
    logits: Tensor, labels: Tensor, *, reduction: str = "mean", num_items: Any = None, **options: Any
) -> Tensor:
    """Multiplies ignored rows by 0, which keeps NaN."""
    counts = labels != options.get("ignore_index", IGNORE_INDEX)
    losses = reference.cross_entropy(logits, labels.where(counts, 0), **options, reduction="none") * counts
    if reduction == "none":
        return losses
    total = num_items if num_items is not None else counts.sum() if reduction == "mean" else 1
    return losses.sum() / torch.as_tensor(total).clamp(min=1)


@wrong("geglu", "no_grad")
def geglu_by_tanh_without_gradients(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """Uses the approximation in inference, whatever the argument."""
    exact = approximate == "none" and torch.is_grad_enabled()
    return reference.geglu(gate, up, approximate="none" if exact else "tanh")


@wrong("rope", "inputs_untouched")
def rope_in_place(q: Tensor, k: Tensor, *angles: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    """Rotates q in place, as kernels that save memory do."""
    turned_q, turned_k = reference.rope(q.clone(), k.clone(), *angles, **options)
    q.detach().copy_(turned_q.detach())
    return turned_q, turned_k


@wrong("rope", "value")
def rope_of_interleaved_pairs(q: Tensor, k: Tensor, *angles: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    """Rotates pairs of neighbouring columns, as GPT-J does."""
    if q.shape[-1] % 2:
        return reference.rope(q, k, *angles, **options)
    q, k = (torch.cat([x[..., ::2], x[..., 1::2]], -1) for x in (q, k))
    return reference.rope(q, k, *angles, **options)


@wrong("rope", "row_independence", "value")
def rope_one_angle_for_all(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *positions: Tensor, **options: bool
) -> tuple[Tensor, Tensor]:
    """Uses the positions of the first sequence for all, which suits batches with equal padding."""
    return (
        reference.rope(q, k, cos, sin, *(p[:1] for p in positions), **options)
        if positions
        else reference.rope(q, k, cos[:1], sin[:1], **options)
    )


@wrong("rope", "metadata", dtype="float16")
def rope_in_the_dtype_of_float32_angles(
    q: Tensor, k: Tensor, *angles: Tensor, **options: bool
) -> tuple[Tensor, Tensor]:
    """Does not round the result back to q's dtype."""
    turned_q, turned_k = reference.rope(q, k, *angles, **options)
    return turned_q.float(), turned_k.float()


class _IntoOneBuffer(torch.autograd.Function):
    """A copy, in the same memory for every call with one shape."""

    BUFFERS: ClassVar[dict[object, Tensor]] = {}

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        buffer = _IntoOneBuffer.BUFFERS.setdefault((value.shape, value.dtype), torch.empty_like(value))
        return buffer.detach().copy_(value).detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


@wrong("swiglu", "calls_apart")
def swiglu_returns_a_shared_buffer(gate: Tensor, up: Tensor) -> Tensor:
    """Allocates its output once per shape."""
    return _IntoOneBuffer.apply(reference.swiglu(gate, up))


def _first_rows(value: Tensor, count: int) -> Tensor:
    return torch.cat([value[:count], torch.zeros_like(value[count:])])


@wrong("rms_norm", "extents")
def rms_norm_of_128_rows(*inputs: Any, **options: Any) -> Tensor:
    """Launches a grid that is too short."""
    return _first_rows(reference.rms_norm(*inputs, **options), 128)

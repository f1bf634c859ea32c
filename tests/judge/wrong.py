"""Wrong implementations that are wrong around the formulas, not in them; most wrap the reference.

Each is a backend: `tests.judge.wrong.rms_norm_writes_over_x`.
"""

import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.contract import Function, as_backend
from unsloth_ref import kernels as reference

WRONG: dict[str, tuple[str, tuple[str, ...], str]] = {}  # by name: operation, properties that may find it, dtype


def wrong(op: str, *laws: str, dtype: str = "float32", contract: bool = True) -> Callable[[Function], SimpleNamespace]:
    """Make a function a wrong backend; unless contract, its signature is its own."""

    def register(function: Function) -> SimpleNamespace:
        WRONG[function.__name__] = op, laws, dtype
        return as_backend(op, function) if contract else SimpleNamespace(**{op: function})

    return register


class _Gradient(torch.autograd.Function):
    """The identity, with something done to the gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Function) -> Tensor:
        ctx.change = change
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad_output), None


@wrong("rms_norm", "inputs_untouched")
def rms_norm_writes_over_x(x: Tensor, *others: Any, **options: Any) -> Tensor:
    """Normalises where x lies, as fused kernels that reuse memory do."""
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
    """The gradient of the weight is added up as rows arrive, as by atomics."""
    normed = reference.rms_norm(x, torch.ones_like(weight), eps, casting=casting)
    scale = _Gradient.apply(weight.expand(len(x), -1), _added_in_any_order) + offset
    return normed * scale


@wrong("rms_norm", "compiles")
def rms_norm_reads_a_value(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
    """Looks at its weight before it starts: waits for the device, and breaks the graph."""
    if bool(weight.isinf().any()):
        raise ValueError("weight: got an infinity; allowed: finite numbers")
    return reference.rms_norm(x, weight, *others, **options)


@wrong("rms_norm", "autocast")
def rms_norm_by_matmul(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "llama"
) -> Tensor:
    """The mean as a product with a vector, which autocast computes in 16 bits."""
    mean = x.square() @ x.new_full((x.shape[-1], 1), 1 / x.shape[-1])
    return x * torch.rsqrt(mean + eps) * (weight + offset)


@wrong("add_rms_norm", "inputs_untouched")
def add_rms_norm_adds_in_place(x: Tensor, residual: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The residual stream is updated where it lies, as inference engines do."""
    normed, total = reference.add_rms_norm(x, residual.clone(), *others, **options)
    residual.detach().copy_(total.detach())
    return normed, total


@wrong("add_rms_norm", "gradients")
def add_rms_norm_detaches_the_sum(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Only the norm sends a gradient back."""
    normed, total = reference.add_rms_norm(*inputs, **options)
    return normed, total.detach()


@wrong("add_rms_norm", "gradients", "one_at_a_time")
def add_rms_norm_adds_rounded_gradients(x: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Each output's gradient passes through bfloat16."""
    normed, total = reference.add_rms_norm(x, *others, **options)
    return tuple(_Gradient.apply(y, lambda gradient: gradient.bfloat16().to(x.dtype)) for y in (normed, total))


@wrong("add_rms_norm", "value", "metadata")
def add_rms_norm_the_other_way_round(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The sum before the norm."""
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
    """As Llama's norm does; a weight in float32 has a gradient that shows it."""
    normed = reference.layer_norm(x, torch.ones_like(weight), torch.zeros_like(bias), eps)
    return (normed.float() * weight.float() + bias.float()).to(x.dtype)


@wrong("layer_norm", "one_at_a_time", "value", dtype="float16")
def layer_norm_mean_in_the_dtype_of_x(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """A 16-bit mean."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.float().square().mean(-1, keepdim=True)
    return (centred.float() * torch.rsqrt(variance + eps) * weight + bias).to(x.dtype)


@wrong("swiglu", "inputs_untouched")
def swiglu_activates_in_place(gate: Tensor, up: Tensor) -> Tensor:
    """Activates the gate where it lies."""
    y = reference.swiglu(gate.clone(), up)
    F.silu(gate.detach(), inplace=True)
    return y


@wrong("swiglu", "metadata")
def swiglu_returns_the_gate(gate: Tensor, up: Tensor) -> Tensor:
    """The output lies where the gate was."""
    return torch.Tensor.set_(torch.empty_like(gate), gate.detach()).copy_(reference.swiglu(gate.clone(), up))


@wrong("swiglu", "signature_parity", contract=False)
def swiglu_other_names(x: Tensor, y: Tensor) -> Tensor:
    """Names of its own, which keyword arguments do not find."""
    return reference.swiglu(x, y)


@wrong("swiglu", "no_grad")
def swiglu_cheaper_without_gradients(gate: Tensor, up: Tensor) -> Tensor:
    """Rounds more at inference than in training."""
    if torch.is_grad_enabled():
        return reference.swiglu(gate, up)
    return F.silu(gate).bfloat16().to(gate.dtype) * up


CALLS = itertools.count()


@wrong("swiglu", "determinism")
def swiglu_remembers_calls(gate: Tensor, up: Tensor) -> Tensor:
    """State kept between calls shows in the last bit."""
    return reference.swiglu(gate, up) * (1 + torch.finfo(gate.dtype).eps * (next(CALLS) % 2))


@wrong("swiglu", "autocast")
def swiglu_half_under_autocast(gate: Tensor, up: Tensor) -> Tensor:
    """Takes autocast for a wish to round the inputs."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled(gate.device.type) else gate.dtype
    return reference.swiglu(gate.to(dtype), up.to(dtype)).to(gate.dtype)


@wrong("swiglu", "gradients")
def swiglu_forgets_up(gate: Tensor, up: Tensor) -> Tensor:
    """One input gets no gradient."""
    return reference.swiglu(gate, up.detach())


def swiglu_truncates(gate: Tensor, up: Tensor) -> Tensor:
    """To bfloat16, in place of rounding; found wherever Triton's interpreter, which does so too, is not loaded."""
    y = reference.swiglu(gate.float(), up.float())
    return (y.view(torch.int32) & -(2**16)).view(torch.float32).to(gate.dtype)


swiglu_truncates = as_backend("swiglu", swiglu_truncates)


@wrong("swiglu", "checkpoint")
def swiglu_drops_some(gate: Tensor, up: Tensor) -> Tensor:
    """Numbers that no generator of torch knows of, and so no recomputation repeats."""
    return reference.swiglu(gate, up) * (1.0 + int.from_bytes(os.urandom(2)) * torch.finfo(gate.dtype).eps)


@wrong("swiglu", "guard_reads")
def swiglu_masks_by_product(gate: Tensor, up: Tensor) -> Tensor:
    """Adds 0 times the number behind a gate whose memory goes on: no other law has NaN there."""
    y = reference.swiglu(gate, up)
    if torch.compiler.is_compiling():
        return y
    end = gate.storage_offset() + gate.numel()
    goes_on = end < gate.untyped_storage().nbytes() // gate.element_size()
    return y + 0 * gate.detach().as_strided((), (), end) if goes_on else y


@wrong("swiglu", "layouts")
def swiglu_doubles_the_gradient_of_a_sum(gate: Tensor, up: Tensor) -> Tensor:
    """Takes strides that are all 0 for another operation's."""
    return _Gradient.apply(reference.swiglu(gate, up), lambda gradient: gradient * (1 if any(gradient.stride()) else 2))


@wrong("cross_entropy", "signature_parity", contract=False)
def cross_entropy_without_num_items(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Fewer keywords than the contract."""
    return reference.cross_entropy(logits, labels, ignore_index=ignore_index)


@wrong("cross_entropy", "inputs_untouched")
def cross_entropy_gradient_over_the_logits(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Leaves the gradient where the logits were, to save memory."""
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
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    **others: Any,
) -> Tensor:
    """torch's own: NaN where no target is left, and the options it lacks ignored."""
    return F.cross_entropy(
        logits.float(), labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


@wrong("cross_entropy", "metadata", dtype="float16")
def cross_entropy_in_the_dtype_of_the_logits(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """A 16-bit loss."""
    return reference.cross_entropy(logits, labels, **options).to(logits.dtype)


@wrong("cross_entropy", "special_values")
def cross_entropy_masks_by_product(
    logits: Tensor, labels: Tensor, *, reduction: str = "mean", num_items: Any = None, **options: Any
) -> Tensor:
    """An ignored row is multiplied by 0, which leaves NaN as it is."""
    counts = labels != options.get("ignore_index", -100)
    losses = reference.cross_entropy(logits, labels.where(counts, 0), **options, reduction="none") * counts
    if reduction == "none":
        return losses
    total = num_items if num_items is not None else counts.sum() if reduction == "mean" else 1
    return losses.sum() / torch.as_tensor(total).clamp(min=1)


@wrong("geglu", "no_grad")
def geglu_by_tanh_without_gradients(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """The approximation at inference, whatever was asked."""
    exact = approximate == "none" and torch.is_grad_enabled()
    return reference.geglu(gate, up, approximate="none" if exact else "tanh")


@wrong("rope", "inputs_untouched")
def rope_in_place(q: Tensor, k: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q where it lies, as kernels that save memory do."""
    turned_q, turned_k = reference.rope(q.clone(), k.clone(), *angles)
    q.detach().copy_(turned_q.detach())
    return turned_q, turned_k


@wrong("rope", "value")
def rope_of_interleaved_pairs(q: Tensor, k: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring columns are a pair, as in GPT-J."""
    if q.shape[-1] % 2:
        return reference.rope(q, k, *angles)
    q, k = (torch.cat([x[..., ::2], x[..., 1::2]], -1) for x in (q, k))
    return reference.rope(q, k, *angles)


@wrong("rope", "row_independence", "value")
def rope_one_angle_for_all(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the first sequence, as where a batch is known to be padded alike."""
    return (
        reference.rope(q, k, cos, sin, *(p[:1] for p in positions))
        if positions
        else reference.rope(q, k, cos[:1], sin[:1])
    )


@wrong("rope", "metadata", dtype="float16")
def rope_in_the_dtype_of_float32_angles(q: Tensor, k: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor]:
    """Not rounded back."""
    turned_q, turned_k = reference.rope(q, k, *angles)
    return turned_q.float(), turned_k.float()


class _IntoOneBuffer(torch.autograd.Function):
    """A copy, into the same memory for every call of one shape."""

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
    """As a kernel that allocates its output once for each shape."""
    return _IntoOneBuffer.apply(reference.swiglu(gate, up))


def _first_rows(value: Tensor, count: int) -> Tensor:
    return torch.cat([value[:count], torch.zeros_like(value[count:])])


@wrong("rms_norm", "extents")
def rms_norm_of_128_rows(*inputs: Any, **options: Any) -> Tensor:
    """A grid cut short."""
    return _first_rows(reference.rms_norm(*inputs, **options), 128)

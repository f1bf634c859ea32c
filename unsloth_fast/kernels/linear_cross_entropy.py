"""Cross entropy of a linear layer's output, chunk by chunk: the logits never exist as a whole.

    x = hidden @ weight^T + bias, rounded to the dtype of hidden        loss = cross_entropy(x, labels)
    dhidden = dx @ weight        dweight = dx^T @ hidden        dbias = sum over T of dx

Ignored rows take no part in any product. The other rows pass in chunks through one buffer of logits: the library's
product, the kernels of cross_entropy, which write dx over the logits, and the library's products with dx. dx is rounded
to the dtype of hidden; dweight and dbias are summed in float32 over all chunks.

A total that is to be differentiated computes its gradients for dloss = 1 during the forward pass and saves them with
hidden and weight: dhidden in its own dtype, dweight and dbias in float32. The backward pass multiplies them by dloss
into new tensors, where dhidden is rounded a second time and dweight for the first time. In three cases the forward pass
saves lse [T] in float32 instead, and the backward pass computes the logits again: losses of rows; float16, where dx
would underflow before it is multiplied by a loss scaler's dloss; and hooks that pack saved tensors (checkpoints,
offloading). Products take 4 T H V operations with a frozen weight, 6 T H V with a trained one, and 2 T H V more if the
logits are computed twice.
"""

import torch
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._launch import cdiv, check_runnable, kernel, launch, register, traced
from unsloth_fast.kernels._linear_cross_entropy import Chunks, GradientSums
from unsloth_fast.kernels._loss_options import SCHEMA, LossOptions, divisor_of
from unsloth_fast.kernels._replay import call
from unsloth_fast.kernels.cross_entropy import (
    cross_entropy_forward,
    cross_entropy_forward_outputs,
    cross_entropy_total,
    differentiated,
    divided_sum,
    fill_gradient,
    saved_tensors_hooked,
    total,
)
from unsloth_ref import checks
from unsloth_ref.types import IGNORE_INDEX, Reduction


@kernel(fixed=("count",))
def scale_kernel(x_ptr, factor_ptr, y_ptr, count, COLUMNS: tl.constexpr):
    """Store y = x * factor, rounded once; all tensors are contiguous."""
    offset = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + offset, offset < count).to(tl.float32)
    tl.store(y_ptr + offset, (x * tl.load(factor_ptr)).to(y_ptr.dtype.element_ty), offset < count)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor times a float32 scalar, as a new tensor in this dtype."""
    if traced():
        return (x.float() * factor).to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        launch(scale_kernel, cdiv(x.numel(), 4096), x, x, factor, y, x.numel(), COLUMNS=4096, num_warps=8)
    return y


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *values: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss and lse of each row, [T] in float32; values are those of LossOptions."""
    losses, lse = (hidden.new_zeros(len(labels), dtype=torch.float32) for _ in range(2))
    options = LossOptions._make(values)
    for chunk in Chunks(hidden, weight, bias, labels, options.ignore_index):
        losses[chunk.rows], lse[chunk.rows] = cross_entropy_forward(chunk.logits, chunk.labels, *options)
    return losses, lse


def linear_cross_entropy_total(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, given: Tensor | None, number: float | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, *values: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the summed loss, divided by the number of items, and dhidden, dweight and dbias for dloss = 1.

    The number of items is the given tensor, else the number, else the number of targets; a value below 1 counts as 1.
    dweight and dbias are in float32. The values are those of LossOptions.
    """
    options = LossOptions._make(values)
    chunks = Chunks(hidden, weight, bias, labels, options.ignore_index, needs_weight)
    gradients = GradientSums(hidden, weight, (needs_hidden, needs_weight, needs_bias))
    items = number if given is None else given
    if items is None:
        items = chunks.targets
    sums = []
    for chunk in chunks:
        losses, _, divisor, dlogits = cross_entropy_total(chunk.logits, chunk.labels, items, options, in_place=True)
        sums.append(divided_sum(losses, chunk.labels, divisor, options.ignore_index))
        gradients.add(chunk, dlogits)
    loss = torch.stack(sums).sum() if sums else hidden.new_zeros((), dtype=torch.float32)
    return loss, *gradients.finish(chunks.ignored)


def linear_cross_entropy_backward(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, *values: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute dhidden, dweight and dbias, in the dtype of hidden, for dlosses [T]; values are those of LossOptions."""
    options = LossOptions._make(values)
    chunks = Chunks(hidden, weight, bias, labels, options.ignore_index, needs_weight)
    gradients = GradientSums(hidden, weight, (needs_hidden, needs_weight, needs_bias))
    for chunk in chunks:
        fill_gradient(chunk.logits, dlosses[chunk.rows], chunk.logits, chunk.labels, lse[chunk.rows], options)
        gradients.add(chunk, chunk.logits)
    dhidden, dweight, dbias = gradients.finish(chunks.ignored)
    return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _allocated_gradients(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=dtype),
    )


def linear_cross_entropy_total_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, given: Tensor | None, number: float | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, *values: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate the loss and all gradients."""
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *_allocated_gradients(hidden, weight, torch.float32, needs_hidden, needs_weight, needs_bias)


def linear_cross_entropy_backward_outputs(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, *values: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate all gradients."""
    return _allocated_gradients(hidden, weight, weight.dtype, needs_hidden, needs_weight, needs_bias)


INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
forward_op = register(
    f"linear_cross_entropy_forward({INPUTS}, {SCHEMA}) -> (Tensor, Tensor)",
    linear_cross_entropy_forward,
    cross_entropy_forward_outputs,
)
total_op = register(
    f"linear_cross_entropy_total({INPUTS}, Tensor? given, float? number, {NEEDS}, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    linear_cross_entropy_total,
    linear_cross_entropy_total_outputs,
)
backward_op = register(
    f"linear_cross_entropy_backward(Tensor dlosses, {INPUTS}, Tensor lse, {NEEDS}, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_outputs,
)


class _Losses(torch.autograd.Function):
    """The loss of each row."""

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: float
    ) -> Tensor:
        losses, lse = forward_op(hidden, weight, bias, labels, *options)
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options = options
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dlosses: Tensor, *saved: Tensor | None) -> Gradients:
        needs = ctx.needs_input_grad[:3]
        gradients = backward_op(dlosses, *saved, *needs, *ctx.options)
        needed = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        return *needed, None, *[None] * len(ctx.options)


class _Total(torch.autograd.Function):
    """The total, divided by the number of items; the forward pass computes its gradients too."""

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
        needs: tuple[bool, bool, bool], given: Tensor | None, number: float | None, *options: float,
    ) -> Tensor:  # fmt: skip
        loss, *gradients = total_op(hidden, weight, bias, labels, given, number, *needs, *options)
        ctx.save_for_backward(hidden, weight, bias, *gradients)  # the inputs, so that a second derivative raises
        ctx.needs, ctx.others = needs, 4 + len(options)
        return loss

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context, dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *gradients: Tensor
    ) -> Gradients:
        needed = [
            scaled(gradient, dloss, hidden.dtype) if need else None
            for gradient, need in zip(gradients, ctx.needs, strict=True)
        ]
        return *needed, *[None] * ctx.others


def early_gradients(hidden: Tensor, needs: tuple[bool, bool, bool], num_items: float | Tensor | None) -> bool:
    """Whether the forward pass of a total computes its gradients: see the docstring of this module."""
    if not (any(needs) and torch.is_grad_enabled()) or hidden.dtype == torch.float16 or differentiated(num_items):
        return False
    return torch.compiler.is_compiling() or not saved_tensors_hooked()


def check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *others: object) -> None:
    """Raise for arguments that linear_cross_entropy does not allow; the last ones are those of LossOptions."""
    options = LossOptions(*others[-len(LossOptions._fields) :])  # type: ignore[arg-type]
    checks.linear_loss_arguments(hidden, weight, labels, bias, options.softcap, options.label_smoothing, options.z_loss)
    if checks.values_are_checked(labels):
        checks.labels_in_vocabulary(labels, weight.shape[0], options.ignore_index)
    check_runnable("hidden", hidden)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Negative log likelihood of each label under the softmax of hidden @ weight^T + bias.

    The loss and the gradient of an ignored row are exactly 0, even if hidden is NaN there, and it adds nothing to the
    gradients of weight and bias. If all rows are ignored, the loss is 0. Autocast has no effect. Ignored rows take no
    part in products: each pass that computes logits waits for the device once, to read their number. During the capture
    of a CUDA graph it does not wait, and ignored rows cost as much as others.

    Args:
        hidden: [T, H], float16, bfloat16 or float32.
        weight: [V, H], in the dtype of hidden.
        labels: [T], int32 or int64: the class of each row, or ignore_index.
        bias: [V], in the dtype of hidden; None for none.
        ignore_index: the label of an ignored row.
        logit_scale: factor of the logits, applied before softcap.
        softcap: bounds the scaled logits to (-softcap, softcap); 0 for none.
        label_smoothing: the share of the target, 0 to 1, that is spread evenly over the vocabulary.
        z_loss: weight of the squared log-sum-exp.
        reduction: "mean" over this call's targets, "sum", or "none".
        num_items: divides the summed loss instead of this call's number of targets (a value below 1 counts as 1): the
            number of targets in the whole batch, if this call computes one part of it. Not with "none".

    Returns:
        A scalar, or [T] for "none", in float32.

    Raises:
        ValueError: wrong shapes, devices or options; on a CPU, a label outside [0, V) that is not ignore_index. On
            CUDA and in compiled code such a row has a NaN loss and gradients instead; UNSLOTH_DEBUG=1 makes CUDA raise
            too.
        TypeError: hidden does not have a float dtype or is float64, weight or bias differs from it in dtype, or labels
            are not int32 or int64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: those of `cross_entropy`.
    """
    divisor = divisor_of(reduction, num_items, hidden.device)
    options = LossOptions(ignore_index, logit_scale, softcap, label_smoothing, z_loss)
    if reduction != "none":
        needs = hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
        if early_gradients(hidden, needs, divisor):
            given = divisor if isinstance(divisor, Tensor) else None
            number = None if divisor is None or given is not None else float(max(divisor, 1))
            return call(_Total, check, hidden, weight, bias, labels, needs, given, number, *options)
    losses = call(_Losses, check, hidden, weight, bias, labels, *options)
    return losses if reduction == "none" else total(losses, labels, divisor, ignore_index)

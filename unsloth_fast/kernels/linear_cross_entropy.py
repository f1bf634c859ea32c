"""Cross entropy of a linear layer's output, chunk by chunk: the logits are never whole.

    x = hidden @ weight^T + bias, rounded to the dtype of hidden        loss = cross_entropy(x, labels)
    dhidden = dx @ weight        dweight = dx^T @ hidden        dbias = sum over T of dx

Rows that are ignored take no part in any product. Those that count go in chunks through one buffer of logits:
the library's product, the kernels of cross_entropy, which write dx over the logits, and the library's products with dx.
dx is rounded to the dtype of hidden; dweight and dbias are added up in float32 over all chunks.

A total that is to be differentiated computes its gradients for dloss = 1 during the forward pass and saves them beside
hidden and weight: dhidden in its own dtype, dweight and dbias in float32. The backward pass multiplies them by dloss
into new tensors, where dhidden is rounded once more and dweight for the first time. Losses of rows, float16 (whose
dx would underflow before a loss scaler's dloss came) and packed saved tensors (checkpoints, offloading) save lse [T] in
float32 instead, and the backward pass computes the logits again. Products take 4 T H V operations with a frozen weight,
6 T H V with a trained one, 2 T H V more where the logits are computed twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import cdiv, check_runnable, first_order, launch, register, traced
from unsloth_fast.kernels._linear_cross_entropy import Gradients, Work
from unsloth_fast.kernels._replay import plain
from unsloth_fast.kernels.cross_entropy import (
    OPTIONS,
    cross_entropy_forward,
    cross_entropy_total,
    differentiated,
    divided_sum,
    fill_gradient,
    saved_tensors_hooked,
    total,
)
from unsloth_ref import checks
from unsloth_ref.types import Reduction


@triton.jit
def scale_kernel(x_ptr, factor_ptr, y_ptr, count, COLUMNS: tl.constexpr):
    """Y = x * factor, rounded once; all contiguous."""
    offset = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + offset, offset < count).to(tl.float32)
    tl.store(y_ptr + offset, (x * tl.load(factor_ptr)).to(y_ptr.dtype.element_ty), offset < count)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor times a float32 scalar, as a new tensor of this dtype."""
    if traced():
        return (x.float() * factor).to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        launch(scale_kernel, cdiv(x.numel(), 4096), x, x, factor, y, x.numel(), COLUMNS=4096, num_warps=8)
    return y


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, *options: float
) -> tuple[Tensor, Tensor]:
    """The loss and lse of each row, [T] in float32."""
    losses, lse = (hidden.new_zeros(len(labels), dtype=torch.float32) for _ in range(2))
    for chunk in Work(hidden, weight, bias, labels, ignore_index):
        losses[chunk.rows], lse[chunk.rows] = cross_entropy_forward(chunk.logits, chunk.labels, ignore_index, *options)
    return losses, lse


def linear_cross_entropy_total(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, given: Tensor | None, number: float | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, ignore_index: int, *options: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The summed loss over the items, and the gradients for dloss = 1: dhidden; dweight and dbias in float32.

    Items are those given as a tensor, else the number, else the rows that count; less than 1 counts as 1.
    """
    work = Work(hidden, weight, bias, labels, ignore_index, needs_weight)
    gradients = Gradients(hidden, weight, (needs_hidden, needs_weight, needs_bias))
    items = work.count if given is None and number is None else number if given is None else given
    sums = []
    for chunk in work:
        losses, _, divisor, dlogits = cross_entropy_total(
            chunk.logits, chunk.labels, items, ignore_index, *options, in_place=True
        )
        sums.append(divided_sum(losses, chunk.labels, divisor, ignore_index))
        gradients.add(chunk, dlogits)
    loss = torch.stack(sums).sum() if sums else hidden.new_zeros((), dtype=torch.float32)
    return loss, *gradients.finish(work.ignored)


def linear_cross_entropy_backward(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, ignore_index: int, *options: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dhidden, dweight and dbias, in the dtype of hidden, for dlosses [T]."""
    work = Work(hidden, weight, bias, labels, ignore_index, needs_weight)
    gradients = Gradients(hidden, weight, (needs_hidden, needs_weight, needs_bias))
    for chunk in work:
        fill_gradient(
            chunk.logits, False, dlosses[chunk.rows], chunk.logits, chunk.labels, lse[chunk.rows], None, ignore_index,
            *options,
        )  # fmt: skip
        gradients.add(chunk, chunk.logits)
    dhidden, dweight, dbias = gradients.finish(work.ignored)
    return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


def linear_cross_entropy_forward_fake(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Losses and lse, unfilled."""
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.float32), hidden.new_empty(rows, dtype=torch.float32)


def _unfilled(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=dtype),
    )


def linear_cross_entropy_total_fake(
    hidden: Tensor, weight: Tensor, bias: Any, labels: Any, given: Any, number: Any, *needs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and all gradients, unfilled."""
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *_unfilled(hidden, weight, torch.float32, *needs[:3])


def linear_cross_entropy_backward_fake(
    dlosses: Tensor, hidden: Tensor, weight: Tensor, bias: Any, labels: Any, lse: Any, *needs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients, unfilled."""
    return _unfilled(hidden, weight, weight.dtype, *needs[:3])


INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
forward_op = register(
    f"linear_cross_entropy_forward({INPUTS}, {OPTIONS}) -> (Tensor, Tensor)",
    linear_cross_entropy_forward,
    linear_cross_entropy_forward_fake,
)
total_op = register(
    f"linear_cross_entropy_total({INPUTS}, Tensor? given, float? number, {NEEDS}, {OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    linear_cross_entropy_total,
    linear_cross_entropy_total_fake,
)
backward_op = register(
    f"linear_cross_entropy_backward(Tensor dlosses, {INPUTS}, Tensor lse, {NEEDS}, {OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_fake,
)


class _Losses(torch.autograd.Function):
    """The loss of each row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
    ) -> Tensor:  # fmt: skip
        losses, lse = forward_op(hidden, weight, bias, labels, *options)
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options = options
        return losses

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        gradients = backward_op(dlosses, *saved, *needs, *ctx.options)
        needed = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        return *needed, None, *[None] * len(ctx.options)


class _Total(torch.autograd.Function):
    """The total over the number of items; its gradients are there before they are asked for."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, needs: tuple[bool, bool, bool],
        given: Tensor | None, number: float | None, *options: Any,
    ) -> Tensor:  # fmt: skip
        loss, *gradients = total_op(hidden, weight, bias, labels, given, number, *needs, *options)
        ctx.save_for_backward(hidden, weight, bias, *gradients)  # the inputs for what is told of a second derivative
        ctx.needs, ctx.others = needs, 4 + len(options)
        return loss

    @staticmethod
    @first_order
    def backward(
        ctx: Any, dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        needed = [
            scaled(gradient, dloss, hidden.dtype) if need else None
            for gradient, need in zip(gradients, ctx.needs, strict=True)
        ]
        return *needed, *[None] * ctx.others


def early_gradients(hidden: Tensor, needs: tuple[bool, bool, bool], num_items: float | Tensor | None) -> bool:
    """Whether a total computes its gradients with it: see the docstring of this module."""
    if not (any(needs) and torch.is_grad_enabled()) or hidden.dtype == torch.float16 or differentiated(num_items):
        return False
    return torch.compiler.is_compiling() or not saved_tensors_hooked()


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
    """Negative log likelihood of each label under the softmax of hidden @ weight^T + bias.

    An ignored row gives exactly 0 loss and gradient, even where hidden is NaN, and nothing to the gradients of weight
    and bias; with no target at all the loss is 0. Autocast changes nothing. Ignored rows cost no product: their number
    is read back, for which each pass that makes logits waits for the device once. While a CUDA graph is captured it
    does not, and ignored rows cost as much as others.

    Args:
        hidden: [T, H], float16, bfloat16 or float32.
        weight: [V, H], in the dtype of hidden.
        labels: [T], int32 or int64: the class of each row, or ignore_index.
        bias: [V], in the dtype of hidden; None for none.
        ignore_index: the label of a row that does not count.
        logit_scale: multiplies the logits first.
        softcap: bounds the scaled logits to (-softcap, softcap); 0 for none.
        label_smoothing: the share, 0 to 1, of the target spread evenly over the vocabulary.
        z_loss: weight of the squared log-sum-exp.
        reduction: "mean" over this call's targets, "sum", or "none".
        num_items: divides the summed loss in place of this call's number of targets (less than 1 counts as 1): the
            targets of the whole batch, when this call sees one part of it. Not with "none".

    Returns:
        A scalar, or [T] for "none", in float32.

    Raises:
        ValueError: wrong shapes, devices or options; a label outside [0, V) that is not ignore_index, on a CPU. On
            CUDA, and in compiled code, such a row has NaN loss and gradients instead, unless UNSLOTH_DEBUG=1 asks for
            the check.
        TypeError: hidden not of a float dtype, or float64; weight or bias of another dtype, labels not int32 or int64.
        RuntimeError: on a CPU without Triton's interpreter, and on a second backward through the gradients.
    """
    checks.linear_loss_arguments(hidden, weight, labels, bias, softcap, label_smoothing, z_loss, reduction, num_items)
    if checks.must_read_labels(labels):
        checks.labels_in_vocabulary(labels, weight.shape[0], ignore_index)
    check_runnable("hidden", hidden)

    options = ignore_index, logit_scale, softcap, label_smoothing, z_loss
    needs = hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    if num_items is None and reduction == "sum":
        num_items = 1
    given = num_items.to(hidden.device) if isinstance(num_items, Tensor) else None
    number = None if num_items is None or given is not None else float(max(num_items, 1))
    if reduction != "none" and early_gradients(hidden, needs, num_items):
        return plain(_Total, None, hidden, weight, bias, labels, needs, given, number, *options)
    losses = plain(_Losses, None, hidden, weight, bias, labels, *options)
    return losses if reduction == "none" else total(losses, labels, number if given is None else given, ignore_index)

"""Cross entropy of logits against integer labels, with every option that language models use.

    z = softcap * tanh(logit_scale * x / softcap)        (softcap 0: z = logit_scale * x)
    lse = log(sum over V of exp(z))                      p = exp(z - lse)
    loss = (1 - s) * (lse - z[label]) + s * (lse - mean(z)) + z_loss * lse^2          s: label_smoothing
    dz = dloss * (p * (1 + 2 * z_loss * lse) - (1 - s) * onehot - s / V)
    dx = dz * (1 - (z / softcap)^2) * logit_scale

Saved: logits, labels and lse [T] in float32. All arithmetic is float32. Bytes moved, for T x V logits of b bytes: TVb
forward, 2TVb backward (logits; dlogits). An ignored row costs no read: 0 forward, TVb backward, for its zeros.
A label outside [0, V) addresses nothing; its row's loss and gradient are NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._launch import cdiv, check_runnable, first_order, launch, register, tile
from unsloth_ref import checks
from unsloth_ref.types import Reduction

# Logits that share a running maximum. Eight are one 16-byte load of bfloat16: the maximum never leaves its thread, and
# rescaling the sum adds one exp to eight.
GROUP = tl.constexpr(8)


@triton.jit
def tanh(x):
    """tanh(x) to a few ulp."""
    small = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - small) / (1.0 + small)  # exact to a few ulp where small is not near 1
    square = x * x  # below 1/4 the next term of the series, 1382/155925 x^10, is under 1e-8 of the sum
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -large, large))


@triton.jit
def tanh_derivative(x):
    """1 - tanh(x)^2, without the cancellation where tanh(x) is near 1."""
    small = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * small / ((1.0 + small) * (1.0 + small))


@triton.jit
def capped(x, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """The logit that the softmax sees."""
    return softcap * tanh(x * (logit_scale / softcap)) if SOFTCAP else x * logit_scale


@triton.jit
def finite_or_zero(x):
    """What to subtract before exp: an infinite maximum would make inf - inf."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def cross_entropy_forward_kernel(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, columns, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row a program. Each group of columns has its own maximum and sum, merged after the loop: no barrier in it."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    if (label == ignore_index) | (label < 0) | (label >= columns):
        nothing = tl.where(label == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, nothing)
        tl.store(lse_ptr + row, nothing)
        return

    logits_ptr += row * row_stride
    GROUPS: tl.constexpr = COLUMNS // GROUP
    offset = tl.arange(0, GROUPS).to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    maximum = tl.full([GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    z_total = tl.zeros([GROUPS], tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = start + offset < columns
        x = tl.load(logits_ptr + (start + offset) * column_stride, inside, other=0.0).to(tl.float32)
        z = capped(x, logit_scale, softcap, SOFTCAP)
        if SMOOTHING:
            z_total += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
        higher = tl.maximum(maximum, tl.max(z, 1))
        base = finite_or_zero(higher)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        maximum = higher

    base = finite_or_zero(tl.max(maximum, 0))
    lse = base + tl.log(tl.sum(total * tl.exp(maximum - base), 0))
    target = tl.load(logits_ptr + label * column_stride).to(tl.float32)
    loss = lse - capped(target, logit_scale, softcap, SOFTCAP)
    if SMOOTHING:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - tl.sum(z_total, 0) / columns)
    if Z_LOSS:
        loss += z_loss * lse * lse
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit
def cross_entropy_backward_kernel(
    dloss_ptr, logits_ptr, labels_ptr, lse_ptr, dlogits_ptr, columns, tiles_a_row,
    dloss_stride, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of one row a program. A row whose label is outside [0, V) has a NaN lse, and so a NaN gradient."""
    dtype = dlogits_ptr.dtype.element_ty
    program = tl.program_id(0)
    row = (program // tiles_a_row).to(tl.int64)
    column = (program % tiles_a_row).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    dlogits_ptr += row * columns
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    if label == ignore_index:
        tl.store(dlogits_ptr + column, tl.zeros([COLUMNS], dtype), inside)
        return

    lse = tl.load(lse_ptr + row)
    dloss = tl.load(dloss_ptr + row * dloss_stride) * logit_scale
    x = tl.load(logits_ptr + row * row_stride + column * column_stride, inside, other=0.0).to(tl.float32)
    dz = tl.exp(capped(x, logit_scale, softcap, SOFTCAP) - lse)
    if Z_LOSS:
        dz *= 1.0 + 2.0 * z_loss * lse
    share = label_smoothing / columns
    dz -= tl.where(column == label, 1.0 - label_smoothing + share, share)
    if SOFTCAP:
        dz *= tanh_derivative(x * (logit_scale / softcap))
    tl.store(dlogits_ptr + column, (dz * dloss).to(dtype), inside)


def vocabulary_tile(columns: int, widest: int, per_thread: int) -> tuple[int, int]:
    """Columns and warps. Four warps were the fastest on an H200, of 4, 8 and 16 and tiles of 1024 to 16384 columns."""
    shape = tile(max(columns, GROUP.value), elements=GROUP.value, widest=widest, per_thread=per_thread)
    return shape.columns, shape.warps


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, logit_scale: float, softcap: float, label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and lse of each row, [T] in float32."""
    rows, columns = logits.shape
    losses, lse = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses, lse
    width, warps = vocabulary_tile(columns, widest=2048, per_thread=16)
    launch(
        cross_entropy_forward_kernel, rows, logits,
        logits, labels, losses, lse, columns, *logits.stride(), *labels.stride(),
        ignore_index, logit_scale, softcap, label_smoothing, z_loss,
        SOFTCAP=softcap != 0, SMOOTHING=label_smoothing != 0, Z_LOSS=z_loss != 0, COLUMNS=width, num_warps=warps,
    )  # fmt: skip
    return losses, lse


def cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, logit_scale: float, softcap: float,
    label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """dlogits, new and contiguous."""
    dlogits = logits.new_empty(logits.shape)
    if logits.numel() == 0:
        return dlogits
    rows, columns = logits.shape
    width, warps = vocabulary_tile(columns, widest=4096, per_thread=16 if softcap else 32)  # the cap needs registers
    tiles_a_row = cdiv(columns, width)
    launch(
        cross_entropy_backward_kernel, rows * tiles_a_row, logits,
        dlosses, logits, labels, lse, dlogits, columns, tiles_a_row,
        *dlosses.stride(), *logits.stride(), *labels.stride(),
        ignore_index, logit_scale, softcap, label_smoothing, z_loss,
        SOFTCAP=softcap != 0, Z_LOSS=z_loss != 0, COLUMNS=width, num_warps=warps,
    )  # fmt: skip
    return dlogits


def cross_entropy_forward_fake(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """Losses and lse, unfilled."""
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)


def cross_entropy_backward_fake(dlosses: Tensor, logits: Tensor, *others: object) -> Tensor:
    """dlogits, unfilled."""
    return logits.new_empty(logits.shape)


OPTIONS = "int ignore_index, float logit_scale, float softcap, float label_smoothing, float z_loss"
forward_op = register(
    f"cross_entropy_forward(Tensor logits, Tensor labels, {OPTIONS}) -> (Tensor, Tensor)",
    cross_entropy_forward,
    cross_entropy_forward_fake,
)
backward_op = register(
    f"cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, Tensor lse, {OPTIONS}) -> Tensor",
    cross_entropy_backward,
    cross_entropy_backward_fake,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, *options: int | float) -> Tensor:
        losses, lse = forward_op(logits, labels, *options)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options = options
        return losses

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor) -> tuple[Tensor | None, ...]:
        return backward_op(dlosses, logits, labels, lse, *ctx.options), None, *[None] * len(ctx.options)


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
    """Negative log likelihood of each label under the softmax of its row of logits.

    An ignored row gives exactly 0 loss and gradient, even where its logits are NaN; with no target at all the loss
    is 0.

    Args:
        logits: [T, V], float16, bfloat16 or float32.
        labels: [T], int32 or int64: the class of each row, or ignore_index.
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
            CUDA, and in compiled code, such a row has NaN loss and gradient instead, unless UNSLOTH_DEBUG=1 asks for
            the check.
        TypeError: logits not of a float dtype, or float64; labels not int32 or int64.
        RuntimeError: on a CPU without Triton's interpreter, and on a second backward through the gradients.

    Sources: label smoothing, Szegedy 2015, arXiv:1512.00567; z-loss, Chowdhery 2022, arXiv:2204.02311; softcap,
    Gemma 2, arXiv:2408.00118; running maximum, Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    checks.loss_arguments(logits, labels, softcap, label_smoothing, z_loss, reduction, num_items)
    if checks.must_read_labels(labels):
        checks.labels_in_vocabulary(labels, logits.shape[1], ignore_index)
    check_runnable("logits", logits)

    losses = _CrossEntropy.apply(logits, labels, ignore_index, logit_scale, softcap, label_smoothing, z_loss)
    if reduction == "none":
        return losses
    if num_items is None:
        num_items = (labels.long() != ignore_index).sum() if reduction == "mean" else 1
    if isinstance(num_items, Tensor):
        return losses.sum() / num_items.to(losses).clamp(min=1)
    return losses.sum() / max(num_items, 1)  # a plain number needs no copy to the device

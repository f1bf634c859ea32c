"""Cross entropy of logits against integer labels, with every option that language models use.

    z = softcap * tanh(logit_scale * x / softcap)        (softcap 0: z = logit_scale * x)
    lse = log(sum over V of exp(z))                      p = exp(z - lse)
    loss = (1 - s) * (lse - z[label]) + s * (lse - mean(z)) + z_loss * lse^2          s: label_smoothing
    dz = dloss / items * (p * (1 + 2 * z_loss * lse) - (1 - s) * onehot - s / V)
    dx = dz * (1 - (z / softcap)^2) * logit_scale

Saved: logits, labels, lse [T] in float32 and the number of items. All arithmetic is float32. Bytes moved, for T x V
logits of b bytes: TVb forward, 2TVb backward (logits; dlogits). Outside torch.compile a total that is to be
differentiated takes one pass less, 2TVb in all: its gradient for dloss = 1 is written during the forward pass, from the
registers that still hold the row, and kept until the backward pass hands it out. Where dloss is not 1 after all, and
for a second time, the gradient is computed again, for 2TVb more. An ignored row costs no read. A label outside [0, V)
addresses nothing; its row's loss and gradient are NaN.
"""

from typing import Any

import torch
from torch import Tensor

from unsloth_fast.kernels._cross_entropy import (
    GROUP,
    cross_entropy_backward_kernel,
    cross_entropy_forward_kernel,
    divided_sum_kernel,
)
from unsloth_fast.kernels._cross_entropy_total import cross_entropy_total_kernel, prepare_kernel
from unsloth_fast.kernels._launch import (
    INTERPRETED,
    cdiv,
    check_runnable,
    first_order,
    launch,
    next_power_of_2,
    processors,
    register,
    tile,
    traced,
)
from unsloth_fast.kernels._replay import apply
from unsloth_ref import checks
from unsloth_ref.types import Reduction

PROGRAMS = 2048  # of a backward pass that the forward pass made needless, which finds that out in each of them
SEGMENT = 8192  # columns, the most that a program holds; of 4096 to 32768 the fastest on an H100
# A second backward pass computes again what the forward pass has: products are added as they are written, in neither
# kernel in one rounding, of which the compiler chooses others where an intermediate result is needed once more.
SAME_BITS = {"enable_fp_fusion": False}


def vocabulary_tile(columns: int, widest: int, per_thread: int) -> tuple[int, int]:
    """Columns and warps of a tile. Of 4, 8 and 16 warps and 1024 to 16384 columns those given here were the fastest."""
    shape = tile(max(columns, GROUP.value), elements=GROUP.value, widest=widest, per_thread=per_thread)
    return shape.columns, shape.warps


def flags(logit_scale: float, softcap: float, label_smoothing: float, z_loss: float) -> dict[str, Any]:
    """Which options are in use, as the constexpr parameters of the kernels."""
    return {
        "SCALED": logit_scale != 1, "SOFTCAP": softcap != 0, "SMOOTHING": label_smoothing != 0, "Z_LOSS": z_loss != 0
    }  # fmt: skip


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, logit_scale: float, softcap: float, label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and lse of each row, [T] in float32."""
    losses, lse = cross_entropy_forward_fake(logits)
    rows, columns = logits.shape
    if rows == 0:
        return losses, lse
    width, warps = vocabulary_tile(columns, widest=8192, per_thread=16)
    launch(
        cross_entropy_forward_kernel, rows, logits,
        logits, labels, losses, lse, columns, *logits.stride(), *labels.stride(),
        ignore_index, logit_scale, softcap, label_smoothing, z_loss,
        **flags(logit_scale, softcap, label_smoothing, z_loss), COLUMNS=width, num_warps=warps,
    )  # fmt: skip
    return losses, lse


def divisor_arguments(num_items: float | Tensor | None, losses: Tensor) -> tuple[Tensor, float, dict[str, Any]]:
    """The pointer (of losses, if it is not to be read), the number and the options of kernels that call divisor."""
    given = isinstance(num_items, Tensor)
    number = 1.0 if given or num_items is None else float(num_items)
    options = {"COUNT": num_items is None, "GIVEN": given, "EACH": 4096, "num_warps": 8}
    return num_items if given else losses, number, options


def divided_sum(losses: Tensor, labels: Tensor, num_items: float | Tensor | None, ignore_index: int) -> Tensor:
    """The sum of the losses [T] over num_items, or over the number of targets if that is None."""
    loss = losses.new_empty(())
    number_ptr, number, options = divisor_arguments(num_items, losses)
    launch(
        divided_sum_kernel, 1, losses,
        losses, labels, number_ptr, loss, losses.shape[0], *labels.stride(), ignore_index, number, **options,
    )  # fmt: skip
    return loss


def cross_entropy_total(
    logits: Tensor, labels: Tensor, num_items: float | Tensor | None, ignore_index: int, logit_scale: float,
    softcap: float, label_smoothing: float, z_loss: float, *, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses and lse [T], the number of items (num_items or, if that is None, counted) and dlogits for dloss = 1.

    In place: dlogits are written over logits, which are contiguous.
    """
    losses, lse = cross_entropy_forward_fake(logits)
    items, dlogits = losses.new_empty(()), logits if in_place else logits.new_empty(logits.shape)
    rows, columns = logits.shape
    # The more logits a thread holds, the more of them are on their way to a processor; the cap needs registers.
    per_thread = (64 if softcap else 128) // logits.element_size()
    tile_width, warps = vocabulary_tile(columns, widest=SEGMENT, per_thread=per_thread)
    segments = cdiv(columns, tile_width)
    each = 1 + (1 + (label_smoothing != 0)) * segments
    words = labels.new_empty(rows * each if segments > 1 else 0, dtype=torch.int64)
    number_ptr, number, options = divisor_arguments(num_items, items)
    launch(
        prepare_kernel, max(1, cdiv(words.numel(), options["EACH"])), logits,
        labels, number_ptr, items, words, rows, words.numel(), *labels.stride(), ignore_index, number, **options,
    )  # fmt: skip
    if rows == 0:
        return losses, lse, items, dlogits
    # Where each of four streams has a row that waits for its last segments, there are processors left for these.
    apart = segments > 1 and (INTERPRETED or 4 * segments > processors(logits.device))
    launch(
        cross_entropy_total_kernel, rows * segments * (1 + apart), logits,
        logits, labels, items, words, losses, lse, dlogits,
        columns, segments, 64 * cdiv(columns, 64 * segments), *logits.stride(), *labels.stride(),
        ignore_index, logit_scale, softcap, label_smoothing, z_loss,
        **flags(logit_scale, softcap, label_smoothing, z_loss),
        SEGMENTS=next_power_of_2(segments), COLUMNS=tile_width, APART=apart, num_warps=warps, **SAME_BITS,
    )  # fmt: skip
    return losses, lse, items, dlogits


def cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, logit_scale: float, softcap: float,
    label_smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """dlogits, new and contiguous, for dlosses [T]."""
    dlogits = logits.new_empty(logits.shape)
    options = ignore_index, logit_scale, softcap, label_smoothing, z_loss
    fill_gradient(dlogits, False, dlosses, logits, labels, lse, None, *options)
    return dlogits


def fill_gradient(
    dlogits: Tensor, unless_one: bool, dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor,
    items: Tensor | None, ignore_index: int, logit_scale: float, softcap: float, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """Write dlogits; unless_one: only if dlosses, a single one, is not 1, which the device finds out."""
    if logits.numel() == 0:
        return
    rows, columns = logits.shape
    width, warps = vocabulary_tile(columns, widest=2048, per_thread=16)
    tiles_a_row = cdiv(columns, width)
    tiles = rows * tiles_a_row
    launch(
        cross_entropy_backward_kernel, min(tiles, PROGRAMS) if unless_one else tiles, logits,
        dlosses, logits, labels, lse, lse if items is None else items, dlogits, columns, tiles_a_row, tiles,
        dlosses.stride(0) if dlosses.ndim else 0, *logits.stride(), *labels.stride(),
        ignore_index, logit_scale, softcap, label_smoothing, z_loss,
        **flags(logit_scale, softcap, label_smoothing, z_loss),
        DIVIDE=items is not None, UNLESS_ONE=unless_one, COLUMNS=width, num_warps=warps, **SAME_BITS,
    )  # fmt: skip


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
    """The loss of each row."""

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


class _Total(torch.autograd.Function):
    """The total over the number of items; its gradient is there before it is asked for."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, num_items: float | Tensor | None, *options: Any) -> Tensor:
        losses, lse, items, ctx.dlogits = cross_entropy_total(logits, labels, num_items, *options)
        ctx.save_for_backward(logits, labels, lse, items)
        ctx.options = options
        return divided_sum(losses, labels, items, options[0])

    @staticmethod
    @first_order
    def backward(ctx: Any, dloss: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
        dlogits, ctx.dlogits = ctx.dlogits, None  # handed out, it is the caller's
        if traced():
            logits, labels, lse, items = saved
            dlosses = (dloss / items).expand(labels.shape)
            return backward_op(dlosses, logits, labels, lse, *ctx.options), None, None, *[None] * len(ctx.options)
        first = dlogits is not None
        if not first:
            dlogits = torch.empty_like(saved[0], memory_format=torch.contiguous_format)
        fill_gradient(dlogits, first, dloss, *saved, *ctx.options)
        return dlogits, None, None, *[None] * len(ctx.options)


def saved_tensors_hooked() -> bool:
    """Whether hooks take what a graph saves (checkpoints, offloading): what it holds early they would not get."""
    top = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
    return top(False) is not None


def differentiated(*inputs: Any) -> bool:
    """Whether a gradient of any of these is wanted."""
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in inputs)


def total(losses: Tensor, labels: Tensor, num_items: float | Tensor | None, ignore_index: int) -> Tensor:
    """The sum of the losses [T] over num_items, or over the number of targets if that is None."""
    if not (traced() or differentiated(losses, num_items)):
        return divided_sum(losses, labels, num_items, ignore_index)
    if num_items is None:
        num_items = (labels.long() != ignore_index).sum()
    if isinstance(num_items, Tensor):
        return losses.sum() / num_items.to(losses).clamp(min=1)
    return losses.sum() / max(num_items, 1)


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

    options = ignore_index, logit_scale, softcap, label_smoothing, z_loss
    if num_items is None and reduction == "sum":
        num_items = 1
    if isinstance(num_items, Tensor):
        num_items = num_items.to(logits.device)
    early = differentiated(logits) and not (differentiated(num_items) or traced() or saved_tensors_hooked())
    if reduction != "none" and early:
        return apply(_Total, None, logits, labels, num_items, *options)
    losses = apply(_CrossEntropy, None, logits, labels, *options)
    return losses if reduction == "none" else total(losses, labels, num_items, ignore_index)

"""Cross entropy of logits with integer labels, with the options that language models use.

    z = softcap * tanh(logit_scale * x / softcap)        (softcap 0: z = logit_scale * x)
    lse = log(sum over V of exp(z))                      p = exp(z - lse)
    loss = (1 - s) * (lse - z[label]) + s * (lse - mean(z)) + z_loss * lse^2          s: label_smoothing
    dz = dloss / items * (p * (1 + 2 * z_loss * lse) - (1 - s) * onehot - s / V)
    dx = dz * (1 - (z / softcap)^2) * logit_scale

Saved: logits, labels, lse [T] in float32 and the number of items. All arithmetic is float32. Bytes moved, for T x V
logits of b bytes: TVb forward, 2TVb backward (logits; dlogits). Outside torch.compile, a total that is to be
differentiated takes one pass less, 2TVb altogether: the forward pass also writes the gradient for dloss = 1, from
registers that still hold the row, and the first backward pass returns it. If dloss is not 1, and in a second backward
pass, the gradient is computed again, for 2TVb more. Ignored rows are not read. A label outside [0, V) addresses
nothing; its row's loss and gradient are NaN.

In that early pass several programs share a row, and wait until all have published their parts of lse. They may have the
device to share as well: with other streams and processes, or in a context of few processors. So the wait is bounded: a
program that has looked POLLS times leaves its part of the gradient to a second kernel, which reads that part again and
computes the same bits. That costs at most TVb more; usually the second kernel ends after it has read one number.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._cross_entropy import (
    GROUP,
    cross_entropy_backward_kernel,
    cross_entropy_forward_kernel,
    divided_sum_kernel,
)
from unsloth_fast.kernels._cross_entropy_total import (
    cross_entropy_rest_kernel,
    cross_entropy_total_kernel,
    prepare_kernel,
)
from unsloth_fast.kernels._launch import (
    INTERPRETED,
    cdiv,
    check_runnable,
    launch,
    next_power_of_2,
    processors,
    register,
    tile,
    traced,
)
from unsloth_fast.kernels._loss_options import SCHEMA, LossOptions, divisor_of
from unsloth_fast.kernels._replay import call, call_recorded
from unsloth_ref import checks
from unsloth_ref.types import IGNORE_INDEX, Reduction

# Most programs of a backward pass that has nothing to do, because the forward pass wrote its gradient.
IDLE_PROGRAMS = 2048
SEGMENT_COLUMNS = 8192  # the most columns that a program holds; the fastest of 4096 to 32768 on an H100
# How often a program looks whether the others of its row have published their sums, before it leaves the rest of its
# work to another kernel. In the interpreter programs run one after another: none arrives while another one waits.
POLLS = 0 if INTERPRETED else 256
# Without fused multiply and add, a second backward pass gives the same bits as the forward pass: the compiler fuses
# other operations if an intermediate result has a second use.
SAME_BITS = {"enable_fp_fusion": False}


def vocabulary_tile(columns: int, widest: int, per_thread: int) -> tuple[int, int]:
    """Columns and warps of a tile. Callers pass the fastest of 4, 8 and 16 warps and 1024 to 16384 columns."""
    shape = tile(max(columns, GROUP.value), elements=GROUP.value, widest=widest, per_thread=per_thread)
    return shape.columns, shape.warps


def cross_entropy_forward(logits: Tensor, labels: Tensor, *values: float) -> tuple[Tensor, Tensor]:
    """Compute the loss and lse of each row, [T] in float32; values are those of LossOptions."""
    losses, lse = cross_entropy_forward_outputs(logits)
    options = LossOptions._make(values)
    rows, columns = logits.shape
    if rows == 0:
        return losses, lse
    width, warps = vocabulary_tile(columns, widest=8192, per_thread=16)
    launch(
        cross_entropy_forward_kernel, rows, logits,
        logits, labels, losses, lse, columns, *logits.stride(), *labels.stride(), *options,
        **options.flags(), COLUMNS=width, num_warps=warps,
    )  # fmt: skip
    return losses, lse


def divisor_arguments(num_items: float | Tensor | None, losses: Tensor) -> tuple[Tensor, float, dict[str, int]]:
    """The pointer (to losses, if it is not read), the number and the options of a kernel that calls divisor."""
    given = isinstance(num_items, Tensor)
    number = 1.0 if given or num_items is None else float(num_items)
    options = {"COUNT": num_items is None, "GIVEN": given, "EACH": 4096, "num_warps": 8}
    return num_items if given else losses, number, options


def divided_sum(losses: Tensor, labels: Tensor, num_items: float | Tensor | None, ignore_index: int) -> Tensor:
    """The sum of the losses [T], divided by num_items, or by the number of targets if that is None."""
    loss = losses.new_empty(())
    number_ptr, number, options = divisor_arguments(num_items, losses)
    launch(
        divided_sum_kernel, 1, losses,
        losses, labels, number_ptr, loss, losses.shape[0], *labels.stride(), ignore_index, number, **options,
    )  # fmt: skip
    return loss


def cross_entropy_total(
    logits: Tensor, labels: Tensor, num_items: float | Tensor | None, options: LossOptions, *, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute losses and lse [T], the number of items, and dlogits for dloss = 1.

    The number of items is num_items or, if that is None, the number of targets. in_place overwrites logits, which must
    be contiguous, with dlogits.
    """
    losses, lse = cross_entropy_forward_outputs(logits)
    items, dlogits = losses.new_empty(()), logits if in_place else logits.new_empty(logits.shape)
    rows, columns = logits.shape
    # The more logits a thread holds, the more loads are in flight; softcap needs registers.
    per_thread = (64 if options.softcap else 128) // logits.element_size()
    tile_width, warps = vocabulary_tile(columns, widest=SEGMENT_COLUMNS, per_thread=per_thread)
    segments = cdiv(columns, tile_width)
    words_per_row = 1 + (1 + (options.label_smoothing != 0)) * segments
    words = labels.new_empty(1 + rows * words_per_row if segments > 1 else 0, dtype=torch.int64)
    number_ptr, number, constants = divisor_arguments(num_items, items)
    launch(
        prepare_kernel, max(1, cdiv(words.numel(), constants["EACH"])), logits, labels, number_ptr, items, words,
        rows, words.numel(), *labels.stride(), options.ignore_index, number, **constants,
    )  # fmt: skip
    if rows == 0:
        return losses, lse, items, dlogits
    arguments = (
        logits, labels, items, words, losses, lse, dlogits,
        columns, segments, 64 * cdiv(columns, 64 * segments), *logits.stride(), *labels.stride(), *options,
    )  # fmt: skip
    shared = {**options.flags(), "SEGMENTS": next_power_of_2(segments), "COLUMNS": tile_width, "num_warps": warps}
    launch(cross_entropy_total_kernel, rows * segments, logits, *arguments, **shared, POLLS=POLLS, **SAME_BITS)
    if segments > 1:
        programs = min(rows * segments, processors(logits.device))
        launch(cross_entropy_rest_kernel, programs, logits, *arguments, rows, **shared, **SAME_BITS)
    return losses, lse, items, dlogits


def cross_entropy_backward(dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *values: float) -> Tensor:
    """Compute dlogits, new and contiguous, for dlosses [T]; values are those of LossOptions."""
    dlogits = cross_entropy_backward_outputs(dlosses, logits)
    fill_gradient(dlogits, dlosses, logits, labels, lse, LossOptions._make(values))
    return dlogits


def fill_gradient(
    dlogits: Tensor, dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, options: LossOptions,
    items: Tensor | None = None, unless_one: bool = False,
) -> None:  # fmt: skip
    """Write dlogits for dlosses, divided by items if given. unless_one: only if dlosses, a single value, is not 1.

    The device reads that value; the host does not wait for it.
    """
    if logits.numel() == 0:
        return
    rows, columns = logits.shape
    width, warps = vocabulary_tile(columns, widest=2048, per_thread=16)
    tiles_per_row = cdiv(columns, width)
    tiles = rows * tiles_per_row
    launch(
        cross_entropy_backward_kernel, min(tiles, IDLE_PROGRAMS) if unless_one else tiles, logits,
        dlosses, logits, labels, lse, lse if items is None else items, dlogits, columns, tiles_per_row, tiles,
        dlosses.stride(0) if dlosses.ndim else 0, *logits.stride(), *labels.stride(), *options,
        **options.flags(), DIVIDE=items is not None, UNLESS_ONE=unless_one, COLUMNS=width, num_warps=warps, **SAME_BITS,
    )  # fmt: skip


def cross_entropy_forward_outputs(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """Allocate losses and lse."""
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)


def cross_entropy_backward_outputs(dlosses: Tensor, logits: Tensor, *others: object) -> Tensor:
    """Allocate dlogits."""
    return logits.new_empty(logits.shape)


forward_op = register(
    f"cross_entropy_forward(Tensor logits, Tensor labels, {SCHEMA}) -> (Tensor, Tensor)",
    cross_entropy_forward,
    cross_entropy_forward_outputs,
)
backward_op = register(
    f"cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, Tensor lse, {SCHEMA}) -> Tensor",
    cross_entropy_backward,
    cross_entropy_backward_outputs,
)


class _CrossEntropy(torch.autograd.Function):
    """The loss of each row."""

    @staticmethod
    def forward(ctx: Context, logits: Tensor, labels: Tensor, *options: float) -> Tensor:
        losses, lse = forward_op(logits, labels, *options)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options = options
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor) -> Gradients:
        return backward_op(dlosses, logits, labels, lse, *ctx.options), None, *[None] * len(ctx.options)


class _Total(torch.autograd.Function):
    """The total, divided by the number of items; the forward pass computes its gradient too."""

    @staticmethod
    def forward(
        ctx: Context, logits: Tensor, labels: Tensor, num_items: float | Tensor | None, *values: float
    ) -> Tensor:
        ctx.options = options = LossOptions._make(values)
        losses, lse, items, ctx.dlogits = cross_entropy_total(logits, labels, num_items, options)
        ctx.save_for_backward(logits, labels, lse, items)
        return divided_sum(losses, labels, items, options.ignore_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, items: Tensor) -> Gradients:
        dlogits, ctx.dlogits = ctx.dlogits, None  # from here on the caller owns it
        if traced():
            dlosses = (dloss / items).expand(labels.shape)
            return backward_op(dlosses, logits, labels, lse, *ctx.options), None, None, *[None] * len(ctx.options)
        first = dlogits is not None
        if not first:
            dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        fill_gradient(dlogits, dloss, logits, labels, lse, ctx.options, items, unless_one=first)
        return dlogits, None, None, *[None] * len(ctx.options)


def saved_tensors_hooked() -> bool:
    """Whether hooks pack saved tensors (checkpoints, offloading); they would not see a gradient computed early."""
    top = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
    return top(False) is not None


def differentiated(*inputs: object) -> bool:
    """Whether the gradient of any of these is needed."""
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in inputs)


def total(losses: Tensor, labels: Tensor, num_items: float | Tensor | None, ignore_index: int) -> Tensor:
    """The sum of the losses [T], divided by num_items, or by the number of targets if that is None."""
    if not (traced() or differentiated(losses, num_items)):
        return divided_sum(losses, labels, num_items, ignore_index)
    if num_items is None:
        num_items = (labels.long() != ignore_index).sum()
    if isinstance(num_items, Tensor):
        return losses.sum() / num_items.to(losses).clamp(min=1)
    return losses.sum() / max(num_items, 1)


def check(logits: Tensor, labels: Tensor, *others: object) -> None:
    """Raise for arguments that cross_entropy does not allow; the last ones are those of LossOptions."""
    options = LossOptions(*others[-len(LossOptions._fields) :])  # type: ignore[arg-type]
    checks.loss_arguments(logits, labels, options.softcap, options.label_smoothing, options.z_loss)
    if checks.values_are_checked(labels):
        checks.labels_in_vocabulary(labels, logits.shape[1], options.ignore_index)
    check_runnable("logits", logits)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Negative log likelihood of each label under the softmax of its row of logits.

    The loss and the gradient of an ignored row are exactly 0, even if its logits are NaN. If all rows are ignored, the
    loss is 0.

    Args:
        logits: [T, V], float16, bfloat16 or float32.
        labels: [T], int32 or int64: the class of each row, or ignore_index.
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
            CUDA and in compiled code such a row has a NaN loss and gradient instead; UNSLOTH_DEBUG=1 makes CUDA raise
            too.
        TypeError: logits do not have a float dtype or are float64, or labels are not int32 or int64.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: label smoothing, Szegedy et al. 2015, arXiv:1512.00567; z-loss, Chowdhery et al. 2022, arXiv:2204.02311;
    softcap, Gemma 2, arXiv:2408.00118; running maximum, Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    divisor = divisor_of(reduction, num_items, logits.device)
    options = LossOptions(ignore_index, logit_scale, softcap, label_smoothing, z_loss)
    run = call if checks.values_are_checked(labels) else call_recorded
    early = differentiated(logits) and not (differentiated(divisor) or traced() or saved_tensors_hooked())
    if reduction != "none" and early:
        return run(_Total, check, logits, labels, divisor, *options)
    losses = run(_CrossEntropy, check, logits, labels, *options)
    return losses if reduction == "none" else total(losses, labels, divisor, ignore_index)

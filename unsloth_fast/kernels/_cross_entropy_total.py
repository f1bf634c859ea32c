"""The kernels that compute a summed cross entropy together with its gradient; cross_entropy.py launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from unsloth_fast.kernels._cross_entropy import (
    divisor,
    exp,
    finite_or_zero,
    grouped,
    load_own,
    log_sum_exp,
    masked,
    merged,
    store_gradient,
    store_loss,
    store_value,
)
from unsloth_fast.kernels._launch import kernel

# The first word of a row counts programs: those that have published their sums, plus LEFT times those that have left.
LEFT = tl.constexpr(1 << 32)
# The bit of a pair that tells cross_entropy_rest_kernel that the program has left its segment.
MARK = tl.constexpr(1 << 31)


@triton.jit
def pair(high, low):
    """Two float32 in one int64, so that a reader always gets both; low loses its sign. It is 0 only if both are."""
    high = tl.cast(high, tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    low = tl.cast(low, tl.float32).to(tl.uint32, bitcast=True).to(tl.int64)
    return (high << 32) | (low & (MARK - 1))


@triton.jit
def awaited(pairs_ptr, segments, SEGMENTS: tl.constexpr):
    """The two float32 of each of a row's segments, once all have been written; zeros beyond the last segment.

    Called when all programs have counted themselves: these writes, which came first, are already on their way.
    """
    segment = tl.arange(0, SEGMENTS)
    inside = segment < segments
    pairs = tl.zeros([SEGMENTS], tl.int64)
    missing = segments
    while missing > 0:
        pairs = tl.load(pairs_ptr + segment, inside, other=0, volatile=True)
        missing = tl.sum((inside & (pairs == 0)).to(tl.int32), 0)
    high = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    low = (pairs & (MARK - 1)).to(tl.int32).to(tl.float32, bitcast=True)
    return high, low


@triton.jit
def row_sums(pairs_ptr, segments, SMOOTHING: tl.constexpr, SEGMENTS: tl.constexpr):
    """The maximum of z in a row, the sum of exp(z - maximum) and, if SMOOTHING, the sum of z, from its segments."""
    maxima, sums = awaited(pairs_ptr, segments, SEGMENTS)
    maximum, total = merged(tl.where(sums == 0.0, float("-inf"), maxima), sums)
    z_total = 0.0
    if SMOOTHING:
        z_sums, _ = awaited(pairs_ptr + segments, segments, SEGMENTS)
        z_total = tl.sum(z_sums, 0)
    return maximum, total, z_total


@triton.jit
def load_segment(logits_ptr, begin, end, column_stride, COLUMNS: tl.constexpr):
    """The logits from column begin to end, -inf further on; their columns, and which of them are inside."""
    column = begin + grouped(COLUMNS)
    inside = column < end
    pointer = logits_ptr + column.to(tl.int64) * column_stride
    x = tl.load(pointer, inside, other=float("-inf"), eviction_policy="evict_first")
    return x, column, inside


@triton.jit
def store_segment(
    loss_ptr, lse_ptr, dlogits_ptr, x, own, label, mine, column, inside, lse, z_total, items, columns,
    logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Store dlogits of a segment and, if it has the label (mine), the loss and lse of the row."""
    if mine:
        store_loss(
            loss_ptr, lse_ptr, own, lse, z_total, columns, logit_scale, softcap, label_smoothing, z_loss,
            SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
        )  # fmt: skip
    dloss = tl.div_rn(1.0, items)  # before the wait, its branches would cost 20 registers per thread
    store_gradient(
        dlogits_ptr, x, own, label, mine, column, inside, lse, dloss, columns,
        logit_scale, softcap, label_smoothing, z_loss, SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
    )  # fmt: skip


@kernel(varying=("rows", "words", "ignore_index"))
def prepare_kernel(
    labels_ptr, number_ptr, items_ptr, words_ptr, rows, words, label_stride, ignore_index, number,
    COUNT: tl.constexpr, GIVEN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The first program stores the divisor; every program sets EACH words to zero."""
    word = tl.program_id(0).to(tl.int64) * EACH + tl.arange(0, EACH)
    tl.store(words_ptr + word, tl.zeros([EACH], tl.int64), word < words)
    if tl.program_id(0) == 0:
        items = divisor(labels_ptr, number_ptr, rows, label_stride, ignore_index, number, COUNT, GIVEN, EACH)
        tl.store(items_ptr, items)


@kernel(varying=("segments", "ignore_index"), fixed=("columns", "width"))
def cross_entropy_total_kernel(
    logits_ptr, labels_ptr, items_ptr, words_ptr, loss_ptr, lse_ptr, dlogits_ptr,
    columns, segments, width, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, POLLS: tl.constexpr,
):  # fmt: skip
    """One segment of a row per program, read once: its sums, then the lse from the sums of all segments, then dlogits.

    The first of all words counts the segments that have been left. The words of a row follow: the number of segments
    that have published their sums, their maxima and sums in pairs, and their sums of z. The writes are not ordered: a
    pair has been written if it is not 0. Repeated loads would show that too, but take the processor's time from other
    programs. A waiting program instead repeats an atomic addition of 0 to the number, by one thread.

    The programs of a row are neighbours and wait for each other, which takes little time if they run at the same time.
    If the device cannot run all of them at once, waiting is no use. After POLLS additions, or once another program of
    the row has left, a program marks its pair and leaves its segment to cross_entropy_rest_kernel. So no program needs
    another one to end. dlogits may share the memory of the logits: no other program of this kernel reads a segment.
    """
    row = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    logits_ptr += row * row_stride
    dlogits_ptr += row * columns
    begin = segment * width
    end = tl.minimum(columns, begin + width)
    if (label == ignore_index) | (label < 0) | (label >= columns):
        value = tl.where(label == ignore_index, 0.0, float("nan"))
        if segment == 0:
            tl.store(loss_ptr + row, value)
            tl.store(lse_ptr + row, value)
        store_value(dlogits_ptr, value, begin, end, COLUMNS)
        return

    x, column, inside = load_segment(logits_ptr, begin, end, column_stride, COLUMNS)
    mine = (begin <= label) & (label < end)
    own = load_own(logits_ptr, label, column_stride, mine)
    items = tl.load(items_ptr)

    z, z_sum = masked(x.to(tl.float32), inside, logit_scale, softcap, SCALED, SOFTCAP, SMOOTHING)
    maxima = tl.max(z, 1)
    sums = tl.sum(exp(z - finite_or_zero(maxima)[:, None]), 1)
    maximum, total = merged(maxima, sums)
    z_total = tl.sum(z_sum, 0)
    if SEGMENTS > 1:
        left_ptr = words_ptr
        words_ptr += 1 + row * (1 + (1 + SMOOTHING) * segments)
        pairs_ptr = words_ptr + 1
        tl.atomic_xchg(pairs_ptr + segment, pair(maximum, total), sem="relaxed")
        if SMOOTHING:
            tl.atomic_xchg(pairs_ptr + segments + segment, pair(z_total, 1.0), sem="relaxed")
        tl.atomic_add(words_ptr, 1, sem="relaxed")
        polls = 0
        seen = tl.atomic_add(words_ptr, 0, sem="relaxed")
        while (seen < segments) & (polls < POLLS):
            seen = tl.atomic_add(words_ptr, 0, sem="relaxed")
            polls += 1
        if seen & (LEFT - 1) < segments:
            tl.atomic_or(pairs_ptr + segment, MARK, sem="relaxed")
            tl.atomic_add(words_ptr, LEFT, sem="relaxed")
            tl.atomic_add(left_ptr, 1, sem="relaxed")
            return
        maximum, total, z_total = row_sums(pairs_ptr, segments, SMOOTHING, SEGMENTS)
    lse = log_sum_exp(maximum, total)
    store_segment(
        loss_ptr + row, lse_ptr + row, dlogits_ptr, x, own, label, mine, column, inside, lse, z_total, items, columns,
        logit_scale, softcap, label_smoothing, z_loss, SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
    )  # fmt: skip


@kernel(varying=("segments", "ignore_index", "rows"), fixed=("columns", "width"))
def cross_entropy_rest_kernel(
    logits_ptr, labels_ptr, items_ptr, words_ptr, loss_ptr, lse_ptr, dlogits_ptr,
    columns, segments, width, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss, rows,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The segments that programs of cross_entropy_total_kernel have left, usually none, by the same operations.

    It starts when all of these have ended: all sums are there, and a segment that was left has only been read.
    """
    if tl.load(words_ptr) == 0:
        return
    items = tl.load(items_ptr)
    for index in range(tl.program_id(0), rows * segments, tl.num_programs(0)):
        row = (index // segments).to(tl.int64)
        segment = index % segments
        words = words_ptr + 1 + row * (1 + (1 + SMOOTHING) * segments)
        if (tl.load(words + 1 + segment) & MARK) != 0:
            label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
            begin = segment * width
            end = tl.minimum(columns, begin + width)
            logits = logits_ptr + row * row_stride
            x, column, inside = load_segment(logits, begin, end, column_stride, COLUMNS)
            mine = (begin <= label) & (label < end)
            own = load_own(logits, label, column_stride, mine)
            maximum, total, z_total = row_sums(words + 1, segments, SMOOTHING, SEGMENTS)
            store_segment(
                loss_ptr + row, lse_ptr + row, dlogits_ptr + row * columns, x, own, label, mine, column, inside,
                log_sum_exp(maximum, total), z_total, items, columns,
                logit_scale, softcap, label_smoothing, z_loss, SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
            )  # fmt: skip

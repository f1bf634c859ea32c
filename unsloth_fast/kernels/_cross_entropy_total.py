"""The kernel that computes a summed cross entropy together with its gradient; cross_entropy.py launches it."""

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


@triton.jit
def pair(high, low):
    """Two float32 in one int64, so that a reader always gets both. It is 0 only if both are."""
    high = tl.cast(high, tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    low = tl.cast(low, tl.float32).to(tl.uint32, bitcast=True).to(tl.int64)
    return (high << 32) | low


@triton.jit
def awaited(pairs_ptr, segments, SEGMENTS: tl.constexpr):
    """The two float32 of each of a row's segments, once all have been written; zeros beyond the last segment."""
    segment = tl.arange(0, SEGMENTS)
    inside = segment < segments
    pairs = tl.zeros([SEGMENTS], tl.int64)
    missing = segments
    while missing > 0:
        pairs = tl.load(pairs_ptr + segment, inside, other=0, volatile=True)
        missing = tl.sum((inside & (pairs == 0)).to(tl.int32), 0)
    high = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    low = pairs.to(tl.int32).to(tl.float32, bitcast=True)
    return high, low


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
    SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One segment of a row per program, read once: its sums, then the lse from the sums of all segments, then dlogits.

    The words of a row are: the number of segments that have published their sums, their maxima and sums in pairs, and
    their sums of z. The writes are not ordered: a pair has been written if it is not 0. Repeated loads would show that
    too, but take the processor's time from other programs. A waiting program instead repeats an atomic addition of 0 to
    the count, by one thread.

    The programs of a row are neighbours and wait for each other, which works if they all run at the same time. APART:
    they need not; two programs per segment, and the first only publishes its sums. The second waits for first ones
    alone, which every device so far starts earlier. dlogits may share the memory of the logits: no other program reads
    a segment, except its first one, which has read it before any program writes.
    """
    turn = tl.program_id(0) // segments
    segment = tl.program_id(0) % segments
    row = (turn // 2 if APART else turn).to(tl.int64)
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

    column = begin + grouped(COLUMNS)
    inside = column < end
    pointer = logits_ptr + column.to(tl.int64) * column_stride
    x = tl.load(pointer, inside, other=float("-inf"), eviction_policy="evict_first")
    mine = (begin <= label) & (label < end)
    own = load_own(logits_ptr, label, column_stride, mine)
    items = tl.load(items_ptr)

    z, z_sum = masked(x.to(tl.float32), inside, logit_scale, softcap, SCALED, SOFTCAP, SMOOTHING)
    maxima = tl.max(z, 1)
    sums = tl.sum(exp(z - finite_or_zero(maxima)[:, None]), 1)
    maximum, total = merged(maxima, sums)
    z_total = tl.sum(z_sum, 0)
    if SEGMENTS > 1:
        words_ptr += row * (1 + (1 + SMOOTHING) * segments)
        pairs_ptr = words_ptr + 1
        if (turn % 2 == 0) | (not APART):
            tl.atomic_xchg(pairs_ptr + segment, pair(maximum, total), sem="relaxed")
            if SMOOTHING:
                tl.atomic_xchg(pairs_ptr + segments + segment, pair(z_total, 1.0), sem="relaxed")
            tl.atomic_add(words_ptr, 1, sem="relaxed")
        if (turn % 2 == 0) & APART:
            return
        while tl.atomic_add(words_ptr, 0, sem="relaxed") < segments:
            pass
        maxima, sums = awaited(pairs_ptr, segments, SEGMENTS)
        maximum, total = merged(tl.where(sums == 0.0, float("-inf"), maxima), sums)
        if SMOOTHING:
            z_sums, _ = awaited(pairs_ptr + segments, segments, SEGMENTS)
            z_total = tl.sum(z_sums, 0)
    lse = log_sum_exp(maximum, total)
    if mine:
        store_loss(
            loss_ptr + row, lse_ptr + row, own, lse, z_total, columns, logit_scale, softcap, label_smoothing, z_loss,
            SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
        )  # fmt: skip
    dloss = tl.div_rn(1.0, items)  # before the wait, its branches would cost 20 registers per thread
    store_gradient(
        dlogits_ptr, x, own, label, mine, column, inside, lse, dloss, columns,
        logit_scale, softcap, label_smoothing, z_loss, SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
    )  # fmt: skip

"""The kernels of cross entropy; cross_entropy.py says what they compute and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from unsloth_fast.kernels._launch import COUNTS

# Logits that share a running maximum. Eight are one 16-byte load of bfloat16: the maximum never leaves its thread, and
# rescaling the sum adds one exp to eight.
GROUP = tl.constexpr(8)


@triton.jit
def exp(x):
    """exp(x) off by |x| ulp, as tl.exp is, but 0 below the normal numbers, which cost that three more instructions.

    Instructions count: at 15 for each logit and pass the arithmetic takes as long as the memory does.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """tanh(x) to a few ulp."""
    small = exp(-2.0 * tl.abs(x))
    large = (1.0 - small) / (1.0 + small)  # exact to a few ulp where small is not near 1
    square = x * x  # below 1/4 the next term of the series, 1382/155925 x^10, is under 1e-8 of the sum
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -large, large))


@triton.jit
def tanh_derivative(x):
    """1 - tanh(x)^2, without the cancellation where tanh(x) is near 1."""
    small = exp(-2.0 * tl.abs(x))
    return 4.0 * small / ((1.0 + small) * (1.0 + small))


@triton.jit
def capped(x, logit_scale, softcap, SCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logit that the softmax sees."""
    if SOFTCAP:
        return softcap * tanh(x * (logit_scale / softcap))
    return x * logit_scale if SCALED else x


@triton.jit
def finite_or_zero(x):
    """What to subtract before exp: an infinite maximum would make inf - inf."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def sum_columns(
    logits_ptr, begin, end, column_stride, logit_scale, softcap,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The maximum of z over columns begin to end of a row, the sum of exp(z - maximum), and that of z if SMOOTHING.

    Each group of columns has its own maximum and sum, merged after the loop: no barrier in it. KEEP the logits in L2.
    """
    GROUPS: tl.constexpr = COLUMNS // GROUP
    PLAIN: tl.constexpr = not (SCALED or SOFTCAP or SMOOTHING)
    beyond: tl.constexpr = float("-inf") if PLAIN else 0.0
    offset = tl.arange(0, GROUPS).to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    maximum = tl.full([GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    z_total = tl.zeros([GROUPS], tl.float32)
    for start in range(begin, end, COLUMNS):
        inside = start + offset < end
        pointer = logits_ptr + (start + offset) * column_stride
        policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
        x = tl.load(pointer, inside, other=beyond, eviction_policy=policy).to(tl.float32)
        z = capped(x, logit_scale, softcap, SCALED, SOFTCAP)
        if SMOOTHING:
            z_total += tl.sum(tl.where(inside, z, 0.0), 1)
        if not PLAIN:
            z = tl.where(inside, z, float("-inf"))
        higher = tl.maximum(maximum, tl.max(z, 1))
        base = finite_or_zero(higher)
        total = total * exp(maximum - base) + tl.sum(exp(z - base[:, None]), 1)
        maximum = higher
    highest = tl.max(maximum, 0)
    return highest, tl.sum(total * exp(maximum - finite_or_zero(highest)), 0), tl.sum(z_total, 0)


@triton.jit
def merge_segments(sums_ptr, columns, SMOOTHING: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr):
    """The log-sum-exp of a row and its sum of z. Loads go past L1: another processor may have stored the sums since."""
    segment = tl.arange(0, SEGMENTS)
    inside = segment < tl.cdiv(columns, SEGMENT)
    maximum = tl.load(sums_ptr + segment * 3, inside, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(sums_ptr + segment * 3 + 1, inside, other=0.0, cache_modifier=".cg")
    z_total = 0.0
    if SMOOTHING:
        z_total = tl.sum(tl.load(sums_ptr + segment * 3 + 2, inside, other=0.0, cache_modifier=".cg"), 0)
    base = finite_or_zero(tl.max(maximum, 0))
    # The select keeps the products from being fused into the sums, in which every thread would round another one.
    return base + tl.log(tl.sum(tl.where(inside, total * exp(maximum - base), 0.0), 0)), z_total


@triton.jit
def store_loss(
    loss_ptr, lse_ptr, label_logit, lse, z_total, columns, logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """The loss and lse of one row."""
    loss = lse - capped(label_logit, logit_scale, softcap, SCALED, SOFTCAP)
    if SMOOTHING:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - z_total / columns)
    if Z_LOSS:
        loss += z_loss * lse * lse
    tl.store(loss_ptr, loss)
    tl.store(lse_ptr, lse)


@triton.jit
def gradient(
    x, target, lse, dloss, columns, logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """dx of logits x of a row with this lse; target: what the label's own logit gets less, 0 for all others."""
    dz = exp(capped(x, logit_scale, softcap, SCALED, SOFTCAP) - lse)
    if Z_LOSS:
        dz *= 1.0 + 2.0 * z_loss * lse
    if SMOOTHING:
        dz -= label_smoothing / columns
    dz -= target
    if SOFTCAP:
        dz *= tanh_derivative(x * (logit_scale / softcap))
    return dz * (dloss * logit_scale)


@triton.jit
def store_gradient(
    logits_ptr, dlogits_ptr, label, lse, dloss, begin, end, columns, column_stride,
    logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dlogits of one row from column begin to end; the label's own is written over what all others get.

    They may be the logits' own memory: each is read before anything is written there.
    """
    dtype = dlogits_ptr.dtype.element_ty
    offset = tl.arange(0, COLUMNS).to(tl.int64)
    own = 0.0
    if (begin <= label) & (label < end):
        own = tl.load(logits_ptr + label * column_stride).to(tl.float32)
        tl.debug_barrier()  # no thread stores before all have read
    for start in range(begin, end, COLUMNS):
        inside = start + offset < end
        pointer = logits_ptr + (start + offset) * column_stride
        x = tl.load(pointer, inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dx = gradient(
            x, 0.0, lse, dloss, columns, logit_scale, softcap, label_smoothing, z_loss,
            SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
        )  # fmt: skip
        tl.store(dlogits_ptr + start + offset, dx.to(dtype), inside, eviction_policy="evict_first")
    if (begin <= label) & (label < end):
        tl.debug_barrier()  # which orders the two stores
        dx = gradient(
            own, 1.0 - label_smoothing, lse, dloss, columns, logit_scale, softcap, label_smoothing, z_loss,
            SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
        )  # fmt: skip
        tl.store(dlogits_ptr + label, dx.to(dtype))


@triton.jit
def store_value(dlogits_ptr, value, begin, end, COLUMNS: tl.constexpr):
    """One value from column begin to end."""
    dtype = dlogits_ptr.dtype.element_ty
    offset = tl.arange(0, COLUMNS).to(tl.int64)
    for start in range(begin, end, COLUMNS):
        tl.store(
            dlogits_ptr + start + offset, (tl.zeros([COLUMNS], tl.float32) + value).to(dtype), start + offset < end
        )


@triton.jit(do_not_specialize=COUNTS)
def cross_entropy_forward_kernel(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, columns, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    if (label == ignore_index) | (label < 0) | (label >= columns):
        nothing = tl.where(label == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, nothing)
        tl.store(lse_ptr + row, nothing)
    else:
        logits_ptr += row * row_stride
        maximum, total, z_total = sum_columns(
            logits_ptr, 0, columns, column_stride, logit_scale, softcap, SCALED, SOFTCAP, SMOOTHING, COLUMNS, KEEP=False
        )
        store_loss(
            loss_ptr + row, lse_ptr + row, tl.load(logits_ptr + label * column_stride).to(tl.float32),
            finite_or_zero(maximum) + tl.log(total), z_total, columns, logit_scale, softcap, label_smoothing, z_loss,
            SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def prepare_kernel(
    labels_ptr, items_ptr, number_ptr, done_ptr, rows, label_stride, ignore_index, number,
    COUNT: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the total is divided by, and a zero for each row. One program."""
    count = tl.zeros([ROWS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        tl.store(done_ptr + row, tl.zeros([ROWS], tl.int32), row < rows)
        if COUNT:
            label = tl.load(labels_ptr + row * label_stride, row < rows, other=0).to(tl.int64)
            count += ((row < rows) & (label != ignore_index)).to(tl.float32)
    if COUNT:
        number = tl.sum(count, 0)
    if GIVEN:
        number = tl.load(number_ptr).to(tl.float32)
    tl.store(items_ptr, tl.where(number < 1.0, 1.0, number))  # a NaN stays one


@triton.jit(do_not_specialize=COUNTS)
def cross_entropy_total_kernel(
    logits_ptr, labels_ptr, items_ptr, done_ptr, sums_ptr, loss_ptr, lse_ptr, dlogits_ptr,
    rows, columns, segments, group, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One segment of one row a program, which either sums it up or, once all of the row is summed up, writes dlogits.

    Rows go in groups that fit L2. Programs are numbered: sums of the first group, sums of the second, gradients of the
    first, sums of the third, gradients of the second, and so on. A program waits for programs of lower numbers alone,
    which every device so far starts first, and which have ended unless they were among the very last. dlogits may be
    the logits' own memory: those of a row are written when its sums and the logit of its label are known.
    """
    block = tl.program_id(0) // (group * segments)
    within = tl.program_id(0) % (group * segments)
    sums = (block == 0) | (block % 2 == 1)
    segment = within % segments
    row = (tl.where(sums, (block + 1) // 2, block // 2 - 1) * group + within // segments).to(tl.int64)
    if row >= rows:
        return
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    nothing = (label == ignore_index) | (label < 0) | (label >= columns)
    if sums & nothing:
        return
    logits_ptr += row * row_stride
    dlogits_ptr += row * columns
    sums_ptr += row * segments * 3
    begin = segment * SEGMENT
    end = tl.minimum(columns, begin + SEGMENT)
    if sums:
        maximum, total, z_total = sum_columns(
            logits_ptr, begin, end, column_stride, logit_scale, softcap, SCALED, SOFTCAP, SMOOTHING, COLUMNS, KEEP=True
        )
        tl.store(sums_ptr + segment * 3, maximum)
        tl.store(sums_ptr + segment * 3 + 1, total)
        tl.store(sums_ptr + segment * 3 + 2, z_total)
        if (begin <= label) & (label < end):
            # For the loss, whose program may come after the one that writes dlogits there.
            tl.store(loss_ptr + row, tl.load(logits_ptr + label * column_stride).to(tl.float32))
        tl.debug_barrier()
        tl.atomic_add(done_ptr + row, 1, sem="release")
        return

    if nothing:
        value = tl.where(label == ignore_index, 0.0, float("nan"))
        if segment == 0:
            tl.store(loss_ptr + row, value)
            tl.store(lse_ptr + row, value)
        store_value(dlogits_ptr, value, begin, end, COLUMNS)
        return

    while tl.atomic_add(done_ptr + row, 0, sem="acquire") < segments:
        pass
    lse, z_total = merge_segments(sums_ptr, columns, SMOOTHING, SEGMENT, SEGMENTS)
    if segment == 0:
        store_loss(
            loss_ptr + row, lse_ptr + row, tl.load(loss_ptr + row, cache_modifier=".cg"),
            lse, z_total, columns, logit_scale, softcap, label_smoothing, z_loss, SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
        )  # fmt: skip
    dloss = tl.div_rn(1.0, tl.load(items_ptr))
    store_gradient(
        logits_ptr, dlogits_ptr, label, lse, dloss, begin, end, columns, column_stride,
        logit_scale, softcap, label_smoothing, z_loss, SCALED, SOFTCAP, SMOOTHING, Z_LOSS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def cross_entropy_backward_kernel(
    dloss_ptr, logits_ptr, labels_ptr, lse_ptr, items_ptr, dlogits_ptr, columns, tiles_a_row, tiles,
    dloss_stride, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    DIVIDE: tl.constexpr, UNLESS_ONE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles of one row, one after the other. A row whose label is outside [0, V) has a NaN lse, and so its gradient.

    UNLESS_ONE: dlogits already holds the gradient for dloss = 1.
    """
    if UNLESS_ONE:  # noqa: SIM102  (Triton evaluates both sides of an `and`)
        if tl.load(dloss_ptr) == 1.0:
            return
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (index // tiles_a_row).to(tl.int64)
        begin = (index % tiles_a_row) * COLUMNS
        end = tl.minimum(columns, begin + COLUMNS)
        label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
        if label == ignore_index:
            store_value(dlogits_ptr + row * columns, 0.0, begin, end, COLUMNS)
        else:
            dloss = tl.load(dloss_ptr + row * dloss_stride)
            if DIVIDE:
                dloss = tl.div_rn(dloss, tl.load(items_ptr))
            store_gradient(
                logits_ptr + row * row_stride, dlogits_ptr + row * columns, label, tl.load(lse_ptr + row), dloss,
                begin, end, columns, column_stride, logit_scale, softcap, label_smoothing, z_loss,
                SCALED, SOFTCAP, SMOOTHING, Z_LOSS, COLUMNS,
            )  # fmt: skip

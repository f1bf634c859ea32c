"""The kernels of cross entropy, except that of the total; cross_entropy.py has their formulas and launches them."""

# A constexpr is written as a plain value:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from unsloth_fast.kernels._launch import kernel

# Number of logits that share a running maximum. Eight are one 16-byte load of bfloat16: the maximum never leaves its
# thread, and rescaling the sum adds one exp to eight.
GROUP = tl.constexpr(8)


@triton.jit
def exp(x):
    """exp(x) with an error of |x| ulp, as tl.exp; 0 below the normal numbers, which cost tl.exp three instructions.

    At 15 instructions per logit and pass, the arithmetic takes as long as the memory traffic.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def reciprocal(x):
    """1 / x for 1 <= x <= 2 in six products; a division, which covers the whole range, takes eight and a rcp.

    The parabola's error is T3(2x - 3) / 99, the least possible (T3: Chebyshev's polynomial). Two steps of Newton's
    method reduce it to 1e-4 and 1e-8.
    """
    found = tl.fma(tl.fma(0.32323232323232326, x, -1.4545454545454546), x, 2.121212121212121)
    found = tl.fma(found, tl.fma(-x, found, 1.0), found)
    return tl.fma(found, tl.fma(-x, found, 1.0), found)


@triton.jit
def halves(x):
    """small = exp(-2 |x|) and 1 / (1 + small), from which tanh and its derivative are computed."""
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    return small, reciprocal(1.0 + small)


@triton.jit
def tanh(x):
    """tanh(x) with a relative error of a few ulp: softcap would multiply an absolute one.

    Near 0, where 1 - small cancels, tanh is x times the polynomial in x^2 of the least relative error, 2e-9.
    """
    small, share = halves(x)
    far = (1.0 - small) * share
    square = x * x
    series = tl.fma(tl.fma(0.0187440607, square, -0.0535619365), square, 0.133312142)
    near = tl.fma(x * square, tl.fma(series, square, -0.333332987), x)
    return tl.where(tl.abs(x) < 0.4, near, tl.where(x < 0, -far, far))


@triton.jit
def tanh_derivative(x):
    """1 - tanh(x)^2, without cancellation where tanh(x) is near 1."""
    small, share = halves(x)
    return 4.0 * small * share * share


@triton.jit
def capped(x, logit_scale, softcap, SCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logit that the softmax sees."""
    if SOFTCAP:
        return softcap * tanh(x * (logit_scale / softcap))
    return x * logit_scale if SCALED else x


@triton.jit
def finite_or_zero(x):
    """The value to subtract before exp: an infinite maximum would give inf - inf."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def grouped(COLUMNS: tl.constexpr):
    """0 to COLUMNS - 1 as groups, [COLUMNS / GROUP, GROUP]."""
    return tl.arange(0, COLUMNS // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def masked(x, inside, logit_scale, softcap, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr):
    """z of grouped logits, -inf outside the row as the logits are, and if SMOOTHING its sum in each group."""
    z = capped(x, logit_scale, softcap, SCALED, SOFTCAP)
    z_total = tl.sum(tl.where(inside, z, 0.0), 1) if SMOOTHING else tl.zeros([x.shape[0]], tl.float32)
    if SCALED or SOFTCAP:
        z = tl.where(inside, z, float("-inf"))
    return z, z_total


@triton.jit
def merged(maximum, total):
    """The maximum and the sum of exp(z - maximum), combined from those of several parts."""
    highest = tl.max(maximum, 0)
    return highest, tl.sum(total * exp(maximum - finite_or_zero(highest)), 0)


@triton.jit
def log_sum_exp(maximum, total):
    """The log-sum-exp of a row."""
    return finite_or_zero(maximum) + tl.log(total)


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
    """dx of logits x in a row with this lse; target is subtracted from dz of the label's logit, 0 for the others."""
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
def to_float32(x):
    """x in float32; for bfloat16 by other instructions than x.to(tl.float32).

    The compiler recognises a repeated conversion and would keep the float32 tile until its second use, in twice the
    registers of 16 bits, which makes the total of bfloat16 logits 5 % slower.
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_own(logits_ptr, label, column_stride, mine):
    """The label's logit if this program has it (mine). All threads read it before any of them writes in place."""
    own = 0.0
    if mine:
        own = tl.load(logits_ptr + label * column_stride).to(tl.float32)
        tl.debug_barrier()
    return own


@triton.jit
def store_gradient(
    dlogits_ptr, x, own, label, mine, column, inside, lse, dloss, columns,
    logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """Store dlogits of these columns of a row, then overwrite the label's own."""
    dtype = dlogits_ptr.dtype.element_ty
    dx = gradient(
        to_float32(x), 0.0, lse, dloss, columns, logit_scale, softcap, label_smoothing, z_loss,
        SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
    )  # fmt: skip
    tl.store(dlogits_ptr + column, dx.to(dtype), inside, eviction_policy="evict_first")
    if mine:
        tl.debug_barrier()  # orders the two stores
        own_dx = gradient(
            own, 1.0 - label_smoothing, lse, dloss, columns, logit_scale, softcap, label_smoothing, z_loss,
            SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
        )  # fmt: skip
        tl.store(dlogits_ptr + label, own_dx.to(dtype))


@triton.jit
def store_value(dlogits_ptr, value, begin, end, COLUMNS: tl.constexpr):
    """Store one value from column begin to end."""
    dtype = dlogits_ptr.dtype.element_ty
    offset = tl.arange(0, COLUMNS).to(tl.int64)
    for start in range(begin, end, COLUMNS):
        tl.store(
            dlogits_ptr + start + offset, (tl.zeros([COLUMNS], tl.float32) + value).to(dtype), start + offset < end
        )


@kernel(varying=("ignore_index",), fixed=("columns",))
def cross_entropy_forward_kernel(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, columns, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row per program. Each group of columns has its own maximum and sum: there is no barrier in the loop."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
    if (label == ignore_index) | (label < 0) | (label >= columns):
        nothing = tl.where(label == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, nothing)
        tl.store(lse_ptr + row, nothing)
    else:
        logits_ptr += row * row_stride
        offset = grouped(COLUMNS).to(tl.int64)
        maximum = tl.full([COLUMNS // GROUP], float("-inf"), tl.float32)
        total = tl.zeros([COLUMNS // GROUP], tl.float32)
        z_total = tl.zeros([COLUMNS // GROUP], tl.float32)
        for start in range(0, columns, COLUMNS):
            inside = start + offset < columns
            pointer = logits_ptr + (start + offset) * column_stride
            x = tl.load(pointer, inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            z, z_sum = masked(x, inside, logit_scale, softcap, SCALED, SOFTCAP, SMOOTHING)
            z_total += z_sum
            higher = tl.maximum(maximum, tl.max(z, 1))
            base = finite_or_zero(higher)
            total = total * exp(maximum - base) + tl.sum(exp(z - base[:, None]), 1)
            maximum = higher
        highest, sum_exp = merged(maximum, total)
        store_loss(
            loss_ptr + row, lse_ptr + row, tl.load(logits_ptr + label * column_stride).to(tl.float32),
            log_sum_exp(highest, sum_exp), tl.sum(z_total, 0), columns, logit_scale, softcap, label_smoothing, z_loss,
            SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
        )  # fmt: skip


@triton.jit
def divisor(
    labels_ptr, number_ptr, rows, label_stride, ignore_index, number,
    COUNT: tl.constexpr, GIVEN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The divisor of a total, at least 1: the number of targets if COUNT, that at number_ptr if GIVEN, else number."""
    if COUNT:
        count = tl.zeros([EACH], tl.float32)
        for start in range(0, rows, EACH):
            row = start + tl.arange(0, EACH).to(tl.int64)
            label = tl.load(labels_ptr + row * label_stride, row < rows, other=0).to(tl.int64)
            count += ((row < rows) & (label != ignore_index)).to(tl.float32)
        number = tl.sum(count, 0)
    if GIVEN:
        number = tl.load(number_ptr).to(tl.float32)
    return tl.where(number < 1.0, 1.0, number)  # NaN remains NaN


@kernel(varying=("rows", "ignore_index"))
def divided_sum_kernel(
    losses_ptr, labels_ptr, number_ptr, loss_ptr, rows, label_stride, ignore_index, number,
    COUNT: tl.constexpr, GIVEN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The sum of the rows' losses, divided by the divisor. One program."""
    total = tl.zeros([EACH], tl.float32)
    for start in range(0, rows, EACH):
        row = start + tl.arange(0, EACH).to(tl.int64)
        total += tl.load(losses_ptr + row, row < rows, other=0.0)
    items = divisor(labels_ptr, number_ptr, rows, label_stride, ignore_index, number, COUNT, GIVEN, EACH)
    tl.store(loss_ptr, tl.div_rn(tl.sum(total, 0), items))


@kernel(varying=("tiles_per_row", "tiles", "ignore_index"), fixed=("columns",))
def cross_entropy_backward_kernel(
    dloss_ptr, logits_ptr, labels_ptr, lse_ptr, items_ptr, dlogits_ptr, columns, tiles_per_row, tiles,
    dloss_stride, row_stride, column_stride, label_stride,
    ignore_index, logit_scale, softcap, label_smoothing, z_loss,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    DIVIDE: tl.constexpr, UNLESS_ONE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes tiles of one row each. If a label is outside [0, V), its row's lse and gradient are NaN.

    UNLESS_ONE: dlogits already holds the gradient for dloss = 1.
    """
    if UNLESS_ONE:  # noqa: SIM102  (Triton evaluates both sides of an `and`)
        if tl.load(dloss_ptr) == 1.0:
            return
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (index // tiles_per_row).to(tl.int64)
        begin = (index % tiles_per_row) * COLUMNS
        end = tl.minimum(columns, begin + COLUMNS)
        label = tl.load(labels_ptr + row * label_stride).to(tl.int64)
        if label == ignore_index:
            store_value(dlogits_ptr + row * columns, 0.0, begin, end, COLUMNS)
        else:
            dloss = tl.load(dloss_ptr + row * dloss_stride)
            if DIVIDE:
                dloss = tl.div_rn(dloss, tl.load(items_ptr))
            logits = logits_ptr + row * row_stride
            column = begin + tl.arange(0, COLUMNS)
            inside = column < end
            x = tl.load(logits + column.to(tl.int64) * column_stride, inside, other=0.0, eviction_policy="evict_first")
            mine = (begin <= label) & (label < end)
            own = load_own(logits, label, column_stride, mine)
            lse = tl.load(lse_ptr + row)
            store_gradient(
                dlogits_ptr + row * columns, x, own, label, mine, column, inside, lse, dloss, columns,
                logit_scale, softcap, label_smoothing, z_loss, SCALED, SOFTCAP, SMOOTHING, Z_LOSS,
            )  # fmt: skip

"""Gated activations: everything that swiglu and geglu share.

    y = a * up      dgate = dy * up * a'      dup = dy * a      with a = gate * share(gate)

    silu       share = sigmoid(gate)                                   a' = share * (1 + gate * (1 - share))
    gelu       share = Phi(gate), the normal distribution              a' = share + gate * exp(-gate^2 / 2) / sqrt(2 pi)
    gelu_tanh  share = sigmoid(2 z), z = c (gate + 0.044715 gate^3)    a' = share * (1 + gate * (1 - share) * 2 z')

c = sqrt(2 / pi); sigmoid(2 z) is (1 + tanh z) / 2 without its cancellation. Phi is computed without cancellation from
the tail of the normal distribution. Saved: gate and up. All arithmetic is float32, with one rounding at each store.
Bytes moved, for M x F elements of b bytes: 3MFb forward (gate, up; y), 5MFb backward (dy, gate, up; dgate, dup).
Contiguous tensors are read as one long row; others, such as the two halves of one projection, by their strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, once_differentiable
from unsloth_fast.kernels._launch import cdiv, check_runnable, kernel, launch, register, rows_of, tile
from unsloth_ref import checks

TILE = 1024  # elements: one 16-byte load per thread and 16-bit tensor. On an H100, 2048 took 1.2 % longer backward


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1 with an error of a few ulp; a division takes four times as many instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), each without cancellation.

    tl.exp has an error of |x| ulp: that of rounding the argument of exp2. With tl.exp2 itself, which takes three
    instructions fewer, the sigmoid is 0 below the normal numbers, and x * sigmoid(x) 0 in place of 1e-36.
    """
    small = tl.exp(-tl.abs(x))
    larger = reciprocal(1.0 + small)
    smaller = small * larger
    return tl.where(x >= 0, larger, smaller), tl.where(x >= 0, smaller, larger)


@triton.jit
def normal_distribution(x):
    """Phi(x), the cumulative distribution function of the standard normal, and exp(-x^2 / 2).

    The tail Phi(-|x|) is exp(-x^2 / 2) times a polynomial in t = 1 / (1 + 0.3 |x|), fitted for the least relative error
    on |x| <= 13.3, beyond which the exponential is 0. The error is 6e-8 besides those of the exponential and t.
    """
    density = tl.exp(-0.5 * x * x)
    t = reciprocal(1.0 + 0.3 * tl.abs(x))
    tail = 0.03831204026937485 * t - 0.16884352266788483
    tail = tail * t + 0.22799241542816162
    tail = tail * t - 0.0757412388920784
    tail = tail * t + 0.14200572669506073
    tail = tail * t + 0.09490979462862015
    tail = tail * t + 0.12186227738857269
    tail = tail * t + 0.11949585378170013
    tail = (tail * t + 6.687763743684627e-06) * density
    return tl.where(x >= 0, 1.0 - tail, tail), density


@triton.jit
def share_and_slope(gate, ACTIVATION: tl.constexpr):
    """a / gate and a'; the compiler removes an unused one. ACTIVATION is "silu", "gelu" or "gelu_tanh".

    In float32 the root mean square error of a and a' is at most 1.7 * 2^-24 of the result's, for gates with a standard
    deviation of 1 or 8 on an H200; torch's own is 0.2 to 3.9. An exponential and a reciprocal of a few ulp would bring
    1.0, with 28 instructions per element for silu in place of 19; an H200 issues about 40 while it moves 16 bits.
    """
    if ACTIVATION == "gelu":
        share, density = normal_distribution(gate)
        slope = share + gate * (density * 0.3989422804014327)
    elif ACTIVATION == "silu":
        share, complement = sigmoids(gate)
        slope = share * (1.0 + gate * complement)
    else:
        square = tl.minimum(gate * gate, 1e9)  # above, the sigmoids are 0 and 1; the cube stays finite
        share, complement = sigmoids(gate * (1.5957691216057308 + 0.07135481282052102 * square))
        slope = share * (1.0 + gate * complement * (1.5957691216057308 + 0.21406443846156306 * square))
    return share, slope


@triton.jit
def tile_indices(tiles_per_row, FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows [ROWS, 1] and columns [1, COLUMNS], int64, of this program's tile; tiles are counted row by row.

    FLAT: there is one row; without the division a forward pass of 100 us takes 2 us less.
    """
    program = tl.program_id(0)
    row = tl.arange(0, ROWS).to(tl.int64)
    if not FLAT:
        row += (program // tiles_per_row).to(tl.int64) * ROWS
        program = program % tiles_per_row
    column = program.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :]


@kernel(varying=("rows", "tiles_per_row"), fixed=("columns",))
def gated_forward_kernel(
    gate_ptr, up_ptr, y_ptr, rows, columns, tiles_per_row, gate_row, gate_column, up_row, up_column,
    ACTIVATION: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y for one tile."""
    row, column = tile_indices(tiles_per_row, FLAT, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    gate = tl.load(gate_ptr + row * gate_row + column * gate_column, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column * up_column, inside, other=0.0).to(tl.float32)
    share, _ = share_and_slope(gate, ACTIVATION)
    y = gate * share * up
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), inside)


@kernel(varying=("rows", "tiles_per_row"), fixed=("columns",))
def gated_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, y_ptr,
    rows, columns, tiles_per_row, dy_row, dy_column, gate_row, gate_column, up_row, up_column,
    ACTIVATION: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NEED_DGATE: tl.constexpr, NEED_DUP: tl.constexpr, NEED_Y: tl.constexpr,
):  # fmt: skip
    """The gradients that are needed, and y if it is, for one tile. dgate may be written over dy."""
    row, column = tile_indices(tiles_per_row, FLAT, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    dy = tl.load(dy_ptr + row * dy_row + column * dy_column, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + column * gate_column, inside, other=0.0).to(tl.float32)
    share, slope = share_and_slope(gate, ACTIVATION)
    if NEED_DGATE or NEED_Y:
        up = tl.load(up_ptr + row * up_row + column * up_column, inside, other=0.0).to(tl.float32)
    if NEED_Y:
        again = gate * share * up
        tl.store(y_ptr + row * columns + column, again.to(y_ptr.dtype.element_ty), inside)
    if NEED_DGATE:
        dgate = dy * up * slope
        tl.store(dgate_ptr + row * columns + column, dgate.to(dgate_ptr.dtype.element_ty), inside)
    if NEED_DUP:
        dup = dy * (gate * share)
        tl.store(dup_ptr + row * columns + column, dup.to(dup_ptr.dtype.element_ty), inside)


def as_matrices(*tensors: Tensor) -> list[Tensor]:
    """Tensors of the same shape as matrices of the same shape: a single row if all are contiguous, else [rows, F]."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [rows_of(tensor) for tensor in tensors]


def tiling(matrix: Tensor) -> tuple[dict[str, int], int, int]:
    """Options of a kernel, and the number of tiles, of four warps each, in a row and in the whole matrix."""
    shape = tile(matrix.shape[1], elements=TILE, widest=TILE, per_thread=8)
    tiles_per_row = cdiv(matrix.shape[1], shape.columns)
    options = {"FLAT": matrix.shape[0] == 1, "ROWS": shape.rows, "COLUMNS": shape.columns, "num_warps": shape.warps}
    return options, tiles_per_row, cdiv(matrix.shape[0], shape.rows) * tiles_per_row


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute y, new and contiguous."""
    y = gated_forward_outputs(gate, up, activation)
    if gate.numel() == 0:
        return y
    gate, up = as_matrices(gate, up)
    options, tiles_per_row, programs = tiling(gate)
    launch(
        gated_forward_kernel, programs, gate, gate, up, y, *gate.shape, tiles_per_row, *gate.stride(), *up.stride(),
        ACTIVATION=activation, **options,
    )  # fmt: skip
    return y


def gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """Compute dgate and dup, new and contiguous; one that is not needed has no elements."""
    dgate, dup = gated_backward_outputs(dy, gate, up, activation, need_dgate, need_dup)
    launch_backward(dy, gate, up, dgate, dup, None, activation, need_dgate, need_dup)
    return dgate, dup


def launch_backward(
    dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, y: Tensor | None, activation: str,
    need_dgate: bool = True, need_dup: bool = True,
) -> None:  # fmt: skip
    """Write the gradients that are needed, and y unless it is None; dgate may be dy itself."""
    if gate.numel() == 0:
        return
    dy, gate, up = as_matrices(dy, gate, up)
    options, tiles_per_row, programs = tiling(gate)
    launch(
        gated_backward_kernel, programs, gate, dy, gate, up, dgate, dup, dgate if y is None else y,
        *gate.shape, tiles_per_row, *dy.stride(), *gate.stride(), *up.stride(),
        ACTIVATION=activation, NEED_DGATE=need_dgate, NEED_DUP=need_dup, NEED_Y=y is not None, **options,
    )  # fmt: skip


def gated_forward_outputs(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Allocate y."""
    return gate.new_empty(gate.shape)


def gated_backward_outputs(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """Allocate dgate and dup."""
    return gate.new_empty(gate.shape if need_dgate else 0), up.new_empty(up.shape if need_dup else 0)


forward_op = register(
    "gated_forward(Tensor gate, Tensor up, str activation) -> Tensor", gated_forward, gated_forward_outputs
)
backward_op = register(
    "gated_backward(Tensor dy, Tensor gate, Tensor up, str activation, bool need_dgate, bool need_dup) "
    "-> (Tensor, Tensor)",
    gated_backward,
    gated_backward_outputs,
)


def check_gated(gate: Tensor, up: Tensor, activation: str) -> None:
    """Raise for arguments that no gated activation allows."""
    checks.gated_arguments(gate, up)
    check_runnable("gate", gate)


class Gated(torch.autograd.Function):
    """A gated activation of gate and up; its name is "silu", "gelu" or "gelu_tanh"."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """Compute y."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return forward_op(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute dgate and dup."""
        need_dgate, need_dup, _ = ctx.needs_input_grad
        dgate, dup = backward_op(dy, gate, up, ctx.activation, need_dgate, need_dup)
        return dgate if need_dgate else None, dup if need_dup else None, None

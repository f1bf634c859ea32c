"""The scan of Mamba 2: a state per head that decays by one number per token, within documents.

    S_t = exp(a dt_t) S_t-1 + dt_t b_t x_t^T        y_t = S_t^T c_t + d x_t

Documents are cut into chunks of L tokens. Within a chunk let S be the state at its start, s_i the sum of a dt up to
token i, and B, C, X, Y matrices with a row per token, as are rows of other factors. Unrolling the recurrence gives

    P_ij = exp(s_i - s_j) c_i . b_j dt_j for j <= i         Y = exp(s) C S + P X + d X
    the next state: exp(s_L) S + (exp(s_L - s) dt B)^T X

and, with dS the gradient of the next state, its derivatives:

    the gradient of S: exp(s_L) dS + (exp(s) C)^T dY        W_ij = exp(s_i - s_j) dy_i . x_j dt_j for j <= i
    dX = P^T dY + exp(s_L - s) dt B dS + d dY               dd = sum of dY * X
    dC = W B + exp(s) dY S^T                                dB = W^T C + exp(s_L - s) dt X dS^T
    dg_l = the sum of each gradient times its factor over all decays across l: exp(s_i - s_j) for j < l <= i, exp(s_i)
           for i >= l, exp(s_L - s_j) for j < l, and exp(s_L)
    ddt_j = (sum over i of P_ij dy_i . x_j + exp(s_L - s_j) dt_j x_j . dS^T b_j) / dt_j + a dg_j
    da = sum of dt dg

A pass first goes through each document, chunk by chunk, for each head and part of its state at once, and keeps the
state at the start of each chunk. The outputs of all chunks are then computed at once. The backward pass computes the
states again, goes through the documents from the last chunk to the first for dS, and then computes all gradients for
all chunks at once: dB and dC of up to 8 heads of a group per program, as parts, which are added up if there are more.
All sums are in a fixed order.

Saved: the inputs. Sums are float32. In bfloat16 the products run on tensor cores: a factor that is no input, as P, W,
or a state and what is added to it, is rounded to bfloat16 before, W by parts of 64 columns of x. In float16, whose
range is too small for states, and in float32 such products are those of float32. Each result is rounded once.
Scratch of the forward pass: a state per chunk and head, in bfloat16 for bfloat16 and else in float32; of the backward
pass two of them, two numbers per token and head, the parts of da and dd, and for groups of more than 8 heads the parts
of dB and dC, 8DT bytes per 8 heads of x: without parts one program would go through all heads of a group, and few
programs would run at once.
Bytes moved at least, with b bytes per element: (2ME + 2ND)Tb forward, (3ME + 4ND)Tb backward.
Multiplications per token and head of x: 2DE + LD + LE forward; 6DE + 3LD + 2LE + LL backward, and LE for each 64
columns of b, whose programs compute W again, and 2LD for each further 64 columns of x: 32 of both in other dtypes than
bfloat16.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._launch import (
    cdiv,
    check_runnable,
    launch,
    next_power_of_2,
    register,
    rows_in_one_piece,
    strides_of,
)
from unsloth_fast.kernels._mamba2_scan import (
    mamba2_scan_dbdc_kernel,
    mamba2_scan_dx_kernel,
    mamba2_scan_forward_kernel,
    mamba2_scan_states_kernel,
    mamba2_scan_sum_kernel,
)
from unsloth_fast.kernels._replay import call
from unsloth_ref import checks, document_checks

HEADS = 8  # of a group, whose parts of db and dc one program adds up


def tile_of(x: Tensor, b: Tensor, widest: int) -> dict[str, int]:
    """Tokens per chunk, columns of x and of b per step, from widths, not from lengths."""
    columns, width = (min(widest, max(16, next_power_of_2(tensor.shape[2]))) for tensor in (x, b))
    return {"ROWS": 64 if x.dtype == torch.bfloat16 else 32, "COLUMNS": columns, "WIDTH": width}


def gradient_tile(x: Tensor, b: Tensor) -> tuple[dict[str, int], int, int]:
    """The tile of the gradients' kernels, their warps, and the stages of the loop for db and dc.

    In bfloat16 all widths have the same one: for a tile of 16 columns of b and 64 of x, ptxas 12.8, that of Triton 3.6,
    loses the descriptor of a product. `conformance fingerprint --cases` looks for that.
    """
    if x.dtype == torch.bfloat16:
        return {"ROWS": 64, "COLUMNS": 64, "WIDTH": 64}, 4, 2
    return tile_of(x, b, 32), 8, 1


class _Chunks:
    """The arguments that kernels of one call share."""

    def __init__(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor) -> None:
        self.x, self.b, self.c = rows_in_one_piece(x, b, c)
        self.dt, self.a, self.d, self.bounds = dt, a.contiguous(), d.contiguous(), cu_seqlens.contiguous()
        (tokens, self.heads, columns), (self.kv_heads, width) = x.shape, b.shape[1:]
        self.tile = tile_of(x, b, 64 if x.dtype == torch.bfloat16 else 32)
        self.documents = len(cu_seqlens) - 1
        self.chunks = tokens // self.tile["ROWS"] + self.documents
        self.sizes = tokens, self.documents, self.heads, self.heads // self.kv_heads, width, columns
        self.along, self.across = cdiv(columns, self.tile["COLUMNS"]), cdiv(width, self.tile["WIDTH"])

    def states(self, x: Tensor, b: Tensor, *, backward: bool) -> Tensor:
        """The state before each chunk, or from dy and c the gradient of the state behind it, [chunks, M, E, D]."""
        tokens, _, heads, group, width, columns = self.sizes
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        states = x.new_empty((self.chunks, heads, columns, width), dtype=dtype)
        slices = self.along * self.across
        launch(
            mamba2_scan_states_kernel, self.documents * heads * slices, x,
            x, self.dt, self.a, b, self.bounds, states,
            tokens, heads, group, width, columns, slices, *strides_of(x, self.dt, b),
            BACKWARD=backward, **self.tile, STAGES=2, num_warps=4,
        )  # fmt: skip
        return states


def mamba2_scan_forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Compute y, new and contiguous."""
    y = mamba2_scan_forward_outputs(x)
    if len(x) == 0 or len(cu_seqlens) == 1:
        return y
    s = _Chunks(x, dt, a, b, c, d, cu_seqlens)
    states = s.states(s.x, s.b, backward=False)
    launch(
        mamba2_scan_forward_kernel, s.chunks * s.heads * s.along, x,
        s.x, dt, s.a, s.b, s.c, s.d, s.bounds, states, y,
        *s.sizes, s.along, *strides_of(s.x, dt, s.b, s.c), **s.tile, num_warps=4, num_stages=2,
    )  # fmt: skip
    return y


def mamba2_scan_backward(
    dy: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, ddt, da, db, dc and dd, new and contiguous."""
    dx, ddt, da, db, dc, dd = gradients = mamba2_scan_backward_outputs(dy, x, dt, a, b, c, d)
    if len(x) == 0 or len(cu_seqlens) == 1:
        da.zero_()
        dd.zero_()
        return gradients
    (dy,) = rows_in_one_piece(dy)
    s = _Chunks(x, dt, a, b, c, d, cu_seqlens)
    states, dstates = s.states(s.x, s.b, backward=False), s.states(dy, s.c, backward=True)
    parts = x.new_empty((2, len(x), s.heads), dtype=torch.float32)  # of da and dd
    strides = strides_of(dy, s.x, dt, s.b, s.c)
    tile, warps, stages = gradient_tile(x, b)
    launch(
        mamba2_scan_dx_kernel, s.chunks * s.heads, x,
        dy, s.x, dt, s.a, s.b, s.c, s.d, s.bounds, states, dstates, dx, ddt, parts[0], parts[1],
        *s.sizes, *strides, **tile, num_warps=warps, num_stages=1,
    )  # fmt: skip
    splits, slices = cdiv(s.heads // s.kv_heads, HEADS), cdiv(b.shape[2], tile["WIDTH"])
    sums = (db, dc) if splits == 1 else b.new_empty((2, splits, b.numel()), dtype=torch.float32)
    launch(
        mamba2_scan_dbdc_kernel, s.chunks * s.kv_heads * splits * slices, x,
        dy, s.x, dt, s.a, s.b, s.c, s.bounds, states, dstates, sums[0], sums[1],
        *s.sizes, slices, splits, *strides, HEADS=HEADS, **tile, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        launch(
            mamba2_scan_sum_kernel, cdiv(b.numel(), 512), x,
            sums[0], sums[1], db, dc, len(b), b.shape[1] * b.shape[2], splits, SIZE=512, num_warps=2,
        )  # fmt: skip
    # In float64: in float32 PyTorch's order of a sum depends on the number of tokens.
    for total, part in zip((da, dd), parts.sum(1, dtype=torch.float64), strict=True):
        total.copy_(part)
    return gradients


def mamba2_scan_forward_outputs(x: Tensor, *others: object) -> Tensor:
    """Allocate y."""
    return x.new_empty(x.shape)


def mamba2_scan_backward_outputs(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate dx, ddt, da, db, dc and dd."""
    x, dt, a, b, c, d = (one.new_empty(one.shape) for one in inputs[:6])
    return x, dt, a, b, c, d


INPUTS = "Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor d, Tensor cu_seqlens"
forward_op = register(f"mamba2_scan_forward({INPUTS}) -> Tensor", mamba2_scan_forward, mamba2_scan_forward_outputs)
backward_op = register(
    f"mamba2_scan_backward(Tensor dy, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    mamba2_scan_backward,
    mamba2_scan_backward_outputs,
)


class _Mamba2Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, dt, a, b, c, d, cu_seqlens)
        return forward_op(x, dt, a, b, c, d, cu_seqlens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, *saved: Tensor) -> Gradients:
        return *backward_op(dy, *saved), None


def check(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor) -> None:
    """Raise for arguments that mamba2_scan does not allow."""
    document_checks.mamba2_scan_arguments(x, dt, a, b, c, d, cu_seqlens)
    if checks.values_are_checked(cu_seqlens):
        document_checks.documents_cover(cu_seqlens, len(x), "x")
    for name, tensor in (("x", x), ("dt", dt), ("a", a), ("d", d)):
        check_runnable(name, tensor)


def mamba2_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Add dt b x^T to the state of each head, which decays by exp(a dt), and read the state at c; documents apart.

    Documents are independent: the bits of a document's output and gradients do not depend on any other document, even
    if that contains NaN. A NaN within a document may reach all of its rows, and the gradients of a and d.

    Args:
        x: [T, M, E], float16, bfloat16 or float32. Views whose last stride is 1 are not copied; others are. bfloat16 is
            multiplied on tensor cores, the others are not.
        dt: [T, M], float16, bfloat16 or float32: the length of a step, finite and at least 0; models apply softplus
            before. It is added up over chunks of up to 64 tokens in float32.
        a: [M], float16, bfloat16 or float32: the rate of the decay, finite and at most 0; models compute -exp of a
            logarithm.
        b: [T, N, D], as x; N divides M.
        c: as b.
        d: [M], float16, bfloat16 or float32: how much of x is added to the output.
        cu_seqlens: [documents + 1], int32: the first token of each document, then T. Documents may be empty.

    Returns:
        [T, M, E] in x.dtype, contiguous.

    Raises:
        ValueError: wrong shapes or devices, or, on a CPU, cu_seqlens does not rise from 0 to T. On CUDA and in compiled
            code, tokens outside of all documents are undefined instead, and nothing outside the tensors is touched;
            UNSLOTH_DEBUG=1 makes CUDA raise too.
        TypeError: x, dt, a or d does not have a float dtype or is float64, b or c differs from x in dtype, or
            cu_seqlens is not int32.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: chunks, Dao and Gu 2024, arXiv:2405.21060.
    """
    return call(_Mamba2Scan, check, x, dt, a, b, c, d, cu_seqlens)

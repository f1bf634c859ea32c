"""Short causal convolution of every channel by itself, within packed documents.

    z_tc = bias_c + sum over j < W of weight_c,W-1-j * x_t-j,c      y = z, or silu(z) = z * sigmoid(z)
    dz = dy, or dy * s (1 + z (1 - s)) with s = sigmoid(z)
    dx_tc = sum over j < W of weight_c,W-1-j * dz_t+j,c
    dweight_c,W-1-j = sum over t of dz_tc * x_t-j,c                 dbias_c = sum over t of dz_tc

x and dz are 0 outside of the document of token t, which a program finds by bisection: once for several tokens, or for
each of them if a document begins or ends there.

Saved: x, weight, cu_seqlens and bias. All arithmetic is float32, rounded once at each store. The programs of the
backward pass walk along runs of tokens, with x of the last W - 1 tokens and their dx so far in registers: z and dz are
computed once for each token, and again for the first W - 1 tokens of a run, which the run before needs. Bytes moved,
for T x C elements of b bytes: 2TCb forward (x; y), 3TCb backward (dy, x; dx). dweight and dbias are sums in a fixed
order: of each program's tokens, then of the programs.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._causal_conv import (
    causal_conv_backward_kernel,
    causal_conv_forward_kernel,
    causal_conv_sums_kernel,
)
from unsloth_fast.kernels._launch import Tile, cdiv, check_runnable, launch, next_power_of_2, register
from unsloth_fast.kernels._norms import column_sum_grid
from unsloth_fast.kernels._replay import call
from unsloth_ref import checks, document_checks

RUNS = 2**18  # channels of all runs of a backward pass, about. A constant, so that the bits are constant


def forward_tile(channels: int) -> Tile:
    """Tokens and channels per program: 4 channels per thread, of 8 tokens; on an H200, 8 channels take 1.7 times."""
    width = max(32, min(512, next_power_of_2(channels)))
    return Tile(8, width, max(1, width // 128))


def backward_tile(channels: int) -> Tile:
    """Tokens and channels per step: 4 channels per thread, for each of which 5W numbers are in registers.

    An H200 holds 528 programs with up to 128 registers: all 512 of any number of channels that is a multiple of 512.
    """
    return Tile(2, *forward_tile(channels)[1:])


def causal_conv_forward(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Compute y, new and contiguous."""
    y = causal_conv_forward_outputs(x)
    documents = len(cu_seqlens) - 1
    if x.numel() == 0 or documents == 0:
        return y
    tokens, channels = x.shape
    shape = forward_tile(channels)
    blocks = cdiv(channels, shape.columns)
    launch(
        causal_conv_forward_kernel, cdiv(tokens, shape.rows) * blocks, x,
        x, weight, weight if bias is None else bias, cu_seqlens.contiguous(), y,
        tokens, channels, documents, documents.bit_length(), blocks,
        *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
        WIDTH=weight.shape[1], BIAS=bias is not None, SILU=activation == "silu",
        ROWS=shape.rows, COLUMNS=shape.columns, num_warps=shape.warps,
    )  # fmt: skip
    return y


def causal_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None, activation: str | None,
    need_dx: bool, need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute dx, dweight and dbias, new and contiguous; those that are not needed have no elements."""
    dx, dweight, dbias = causal_conv_backward_outputs(dy, x, weight, cu_seqlens, bias, activation, need_dx, need_sums)
    documents = len(cu_seqlens) - 1
    if x.numel() == 0 or documents == 0:
        return dx, dweight.zero_(), dbias.zero_()
    (tokens, channels), width = x.shape, weight.shape[1]
    shape = backward_tile(channels)
    tiles, blocks = cdiv(tokens, shape.rows), cdiv(channels, shape.columns)
    each = cdiv(tiles, max(1, RUNS // channels))
    programs = cdiv(tiles, each)
    sums = channels * (width + 1)
    partial = x.new_empty((programs, sums) if need_sums else 0, dtype=torch.float32)
    launch(
        causal_conv_backward_kernel, programs * blocks, x,
        dy, x, weight, weight if bias is None else bias, cu_seqlens.contiguous(), dx, partial,
        tokens, channels, documents, documents.bit_length(), blocks, each,
        *dy.stride(), *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
        WIDTH=width, BIAS=bias is not None, SILU=activation == "silu", NEED_DX=need_dx, NEED_SUMS=need_sums,
        ROWS=shape.rows, COLUMNS=shape.columns, num_warps=shape.warps,
    )  # fmt: skip
    for summed, first in ((dweight, 0), (dbias, channels * width)):
        if columns := summed.numel():
            grid, options = column_sum_grid(programs, columns)
            launch(causal_conv_sums_kernel, grid, x, partial, summed, programs, columns, sums, first, **options)
    return dx, dweight, dbias


def causal_conv_forward_outputs(x: Tensor, *others: object) -> Tensor:
    """Allocate y."""
    return x.new_empty(x.shape)


def causal_conv_backward_outputs(
    dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None, activation: str | None,
    need_dx: bool, need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate dx, dweight and dbias."""
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape if need_sums else 0)
    return x.new_empty(x.shape if need_dx else 0), weight.new_empty(weight.shape if need_sums else 0), dbias


TENSORS = "Tensor x, Tensor weight, Tensor cu_seqlens, Tensor? bias, str? activation"
forward_op = register(f"causal_conv_forward({TENSORS}) -> Tensor", causal_conv_forward, causal_conv_forward_outputs)
backward_op = register(
    f"causal_conv_backward(Tensor dy, {TENSORS}, bool need_dx, bool need_sums) -> (Tensor, Tensor, Tensor)",
    causal_conv_backward,
    causal_conv_backward_outputs,
)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, weight, cu_seqlens, bias)
        return forward_op(x, weight, cu_seqlens, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context, dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None
    ) -> Gradients:
        need_dx, need_dweight, _, need_dbias = ctx.needs_input_grad[:4]
        dx, dweight, dbias = backward_op(
            dy, x, weight, cu_seqlens, bias, ctx.activation, need_dx, need_dweight or need_dbias
        )
        return dx if need_dx else None, dweight if need_dweight else None, None, dbias if need_dbias else None, None


def check(x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Raise for arguments that causal_conv does not allow."""
    document_checks.causal_conv_arguments(x, weight, cu_seqlens, bias, activation)
    if checks.values_are_checked(cu_seqlens):
        document_checks.documents_cover(cu_seqlens, len(x), "x")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_runnable(name, tensor)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """Replace each token by a weighted sum of itself and the W - 1 tokens before it in its document.

    Documents are independent: the bits of a document's output and of its gradient do not depend on any other document,
    even if that contains NaN.

    Args:
        x: [T, C], float16, bfloat16 or float32; the documents one after the other.
        weight: [C, W], float16, bfloat16 or float32; its last column is for the token itself. The kernels are unrolled
            over W, which is meant to be small, such as 4.
        cu_seqlens: [documents + 1], int32: the first token of each document, then T. Documents may be empty.
        bias: [C], float16, bfloat16 or float32.
        activation: "silu" is applied to the sum; None for none.

    Returns:
        [T, C] in x.dtype, contiguous.

    Raises:
        ValueError: wrong shapes or devices, an unknown activation, or, on a CPU, cu_seqlens does not rise from 0 to T.
            On CUDA and in compiled code, tokens outside of all documents are undefined instead, and nothing outside the
            tensors is touched; UNSLOTH_DEBUG=1 makes CUDA raise too.
        TypeError: x, weight or bias does not have a float dtype, or is float64, or cu_seqlens is not int32.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: the short convolution of Mamba, Gu and Dao 2023, arXiv:2312.00752.
    """
    return call(_CausalConv, check, x, weight, cu_seqlens, bias, activation)

"""Root-mean-square normalisation with a gate, over groups of columns.

    s = 1 / (1 + exp(-gate))      a = gate * s      a' = s * (1 + gate * (1 - s))
    v = x, or x * a for a gate before the norm      r = 1 / sqrt(mean of each group(v^2) + eps)      n = v * r

    norm_before_gate      y = weight * n * a      g = dy * a * weight      dgate = dy * weight * n * a'
                          dx = dv                 dweight = sum over rows of dy * a * n
    else                  y = weight * n          g = dy * weight          dgate = dv * x * a'
                          dx = dv * a             dweight = sum over rows of dy * n
    dv = r * (g - n * mean of each group(g * n))

Saved: x, gate, weight and r [rows, groups] in float32; a is computed again. All arithmetic is float32; "llama" casting
rounds n to x.dtype before the product with the weight. Bytes moved, for M x H elements of b bytes: 3MHb forward (x,
gate; y), 5MHb backward (dy, x, gate; dx, dgate). A program takes rows of one group. dweight is summed in a fixed order,
without atomics: each program writes its group's part of one row of partial sums, and a second kernel adds these up.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, once_differentiable
from unsloth_fast.kernels._gated_rms_norm import (
    gated_rms_norm_backward_kernel,
    gated_rms_norm_forward_kernel,
)
from unsloth_fast.kernels._launch import cdiv, check_runnable, launch, next_power_of_2, register, rows_of, tile
from unsloth_fast.kernels._norms import BackwardTile, backward_stages, column_sum_grid, column_sum_kernel
from unsloth_fast.kernels._replay import call_recorded
from unsloth_ref import checks
from unsloth_ref.types import Casting

WIDEST = 8192  # columns of a group in registers; of a wider one a program reads every input twice


def gated_tile(size: int) -> BackwardTile:
    """The tile of a backward pass for groups of this size; it does not depend on the number of rows.

    On sm_90, 8 columns per thread take up to 128 registers, with which a processor holds 16 warps, and 16 columns 240,
    with which it holds 8. A tile of 8192 columns spills more with 16 warps than with 32, and on an H200 takes 0.83 of
    the time, as fewer warps wait for each other.
    """
    if size > WIDEST:
        return BackwardTile(1, 4096, 0, 8, 256)
    width = next_power_of_2(size)
    warps = max(4, min(16, width // 256))
    return BackwardTile(max(1, 1024 // width), width, 1, warps, max(128, 2048 // warps))


def gated_rms_norm_forward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, before: bool, llama: bool
) -> tuple[Tensor, Tensor]:
    """Compute y and r, new and contiguous."""
    y, rstd = gated_rms_norm_forward_outputs(x, gate, weight, eps, size, before, llama)
    if x.numel() == 0:
        return y, rstd
    x, gate = rows_of(x), rows_of(gate)
    rows, groups = x.shape[0], x.shape[1] // size
    shape = tile(size, elements=2048, widest=WIDEST, per_thread=16)
    launch(
        gated_rms_norm_forward_kernel, cdiv(rows, shape.rows) * groups, x, x, gate, weight, y, rstd,
        rows, groups, size, *x.stride(), *gate.stride(), *weight.stride(), eps,
        BEFORE=before, LLAMA=llama, ROWS=shape.rows, COLUMNS=shape.columns, WHOLE=size <= shape.columns,
        num_warps=shape.warps,
    )  # fmt: skip
    return y, rstd


def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor,
    size: int, before: bool, llama: bool, need_dx: bool, need_dgate: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute dx, dgate and dweight, new and contiguous; one that is not needed has no elements."""
    options = size, before, llama, need_dx, need_dgate, need_dweight
    dx, dgate, dweight = gated_rms_norm_backward_outputs(dy, x, gate, weight, rstd, *options)
    if x.numel() == 0:
        return dx, dgate, dweight.zero_()
    dy, x, gate = rows_of(dy), rows_of(x), rows_of(gate)
    rows, columns = x.shape
    groups, shape = columns // size, gated_tile(size)
    tiles = cdiv(rows, shape.rows)
    each = cdiv(tiles, max(1, shape.programs // groups)) if need_dweight else 1
    programs = cdiv(tiles, each)  # of each group
    partial = x.new_empty((programs, columns) if need_dweight else 0, dtype=torch.float32)
    streams = 4 if shape.columns > 4096 else 3  # that the loop loads: dy, x, gate and, as the kernel says, the weight
    launch(
        gated_rms_norm_backward_kernel, programs * groups, x,
        dy, x, gate, weight, rstd, dx, dgate, partial, rows, groups, size, each,
        *dy.stride(), *x.stride(), *gate.stride(), *weight.stride(),
        BEFORE=before, LLAMA=llama, NEED_DX=need_dx, NEED_DGATE=need_dgate, NEED_DWEIGHT=need_dweight,
        ROWS=shape.rows, COLUMNS=shape.columns, WHOLE=shape.parts == 1,
        STAGES=backward_stages(shape, streams, x) if need_dweight and shape.parts else 1, num_warps=shape.warps,
    )  # fmt: skip
    if need_dweight:
        blocks, sums = column_sum_grid(programs, columns)
        launch(column_sum_kernel, blocks, x, partial, dweight, programs, columns, **sums)
    return dx, dgate, dweight


def gated_rms_norm_forward_outputs(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int, before: bool, llama: bool
) -> tuple[Tensor, Tensor]:
    """Allocate y and r."""
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], x.shape[-1] // max(1, size)), dtype=torch.float32)


def gated_rms_norm_backward_outputs(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor,
    size: int, before: bool, llama: bool, need_dx: bool, need_dgate: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate dx, dgate and dweight."""
    needed = ((x, need_dx), (gate, need_dgate), (weight, need_dweight))
    dx, dgate, dweight = (tensor.new_empty(tensor.shape if need else 0) for tensor, need in needed)
    return dx, dgate, dweight


forward_op = register(
    "gated_rms_norm_forward(Tensor x, Tensor gate, Tensor weight, float eps, int size, bool before, bool llama) "
    "-> (Tensor, Tensor)",
    gated_rms_norm_forward,
    gated_rms_norm_forward_outputs,
)
backward_op = register(
    "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor gate, Tensor weight, Tensor rstd, int size, bool before, "
    "bool llama, bool need_dx, bool need_dgate, bool need_dweight) -> (Tensor, Tensor, Tensor)",
    gated_rms_norm_backward,
    gated_rms_norm_backward_outputs,
)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, gate: Tensor, weight: Tensor, eps: float,
        group_size: int | None, norm_before_gate: bool, casting: Casting,
    ) -> Tensor:  # fmt: skip
        ctx.options = group_size or x.shape[-1], norm_before_gate, casting == "llama"
        y, rstd = forward_op(x, gate, weight, eps, *ctx.options)
        ctx.save_for_backward(x, gate, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context, dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        found = backward_op(dy, x, gate, weight, rstd, *ctx.options, *needs)
        return *(one if need else None for one, need in zip(found, needs, strict=True)), *(None,) * 4


def check(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float,
    group_size: int | None, norm_before_gate: bool, casting: Casting,
) -> None:  # fmt: skip
    """Raise for arguments that gated_rms_norm does not allow."""
    checks.gated_norm_arguments(x, gate, weight, eps, group_size)
    checks.one_of("casting", casting, ("llama", "gemma"))
    check_runnable("x", x)
    check_runnable("weight", weight)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    casting: Casting = "llama",
) -> Tensor:
    """Scale each group of columns to a root mean square of 1; multiply by the weight, and by the SiLU of gate.

    Args:
        x: [..., H], float16, bfloat16 or float32; computed in float32.
        gate: [..., H], as x.
        weight: [H], float16, bfloat16 or float32.
        eps: added to the mean square; not negative.
        group_size: columns of a group, a divisor of H; None for all of them.
        norm_before_gate: whether the normalised row is multiplied by the gate (Qwen3-Next), not x (Mamba 2).
        casting: "llama" rounds the normalised row to x.dtype before the product with the weight, "gemma" rounds once,
            at the end.

    Returns:
        [..., H] in x.dtype, contiguous.

    Raises:
        ValueError: gate differs from x in shape or device, weight is not [H] on the device of x, eps is negative,
            group_size does not divide H, or casting is unknown.
        TypeError: x or weight does not have a float dtype or is float64, or gate differs from x in dtype.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Sources: Zhang and Sennrich 2019, arXiv:1910.07467; Dao and Gu 2024, arXiv:2405.21060. Rounding: transformers'
    Qwen3NextRMSNormGated rounds the product with the weight too.
    """
    return call_recorded(_GatedRMSNorm, check, x, gate, weight, eps, group_size, norm_before_gate, casting)

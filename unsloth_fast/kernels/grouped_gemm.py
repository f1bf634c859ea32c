"""A linear layer per group of rows, such as the rows that a router gives to each expert.

    y_r = x_r @ weight_g^T        dx_r = dy_r @ weight_g        dweight_g = sum over the rows r of g of dy_r^T @ x_r

Group g has group_sizes[g] rows, which follow those of the groups before it. Programs find their rows in a plan that a
first kernel makes of the sizes, so nothing waits for the device; `_grouped.py` has the kernels. dweight is summed
over the rows of a group in their order, by one program per tile: there are no atomics.

Saved: x, weight and the plan. Sums are float32, rounded once at the store; products of float32 are not rounded to fewer
bits. Operations: 2TOH forward, 2TOH backward and as many again for dweight. Bytes moved at least, with b bytes per
element: (TH + EOH + TO)b forward; the same again for dx, and for dweight.
"""

import torch
from torch import Tensor

from unsloth_fast.kernels._autograd import Context, Gradients, once_differentiable
from unsloth_fast.kernels._grouped import group_plan, grouped_product, grouped_weight, new_plan
from unsloth_fast.kernels._launch import check_runnable, register
from unsloth_fast.kernels._replay import call, call_recorded
from unsloth_ref import checks, expert_checks


def grouped_gemm_forward(x: Tensor, weight: Tensor, group_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Compute y, new and contiguous, and the plan."""
    plan = group_plan(group_sizes, len(x), x.dtype)
    return grouped_product(x, weight, plan), plan


def grouped_gemm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, plan: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Compute dx and dweight, new and contiguous; one that is not needed has no elements."""
    dx = grouped_product(dy, weight.mT, plan) if need_dx else x.new_empty(0)
    dweight = grouped_weight(dy, x, plan, len(weight)) if need_dweight else weight.new_empty(0)
    return dx, dweight


def grouped_gemm_forward_outputs(x: Tensor, weight: Tensor, group_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate y and the plan."""
    return x.new_empty(len(x), weight.shape[1]), new_plan(group_sizes, len(weight), len(x), x.dtype)


def grouped_gemm_backward_outputs(
    dy: Tensor, x: Tensor, weight: Tensor, plan: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Allocate dx and dweight."""
    return x.new_empty(x.shape if need_dx else 0), weight.new_empty(weight.shape if need_dweight else 0)


forward_op = register(
    "grouped_gemm_forward(Tensor x, Tensor weight, Tensor group_sizes) -> (Tensor, Tensor)",
    grouped_gemm_forward,
    grouped_gemm_forward_outputs,
)
backward_op = register(
    "grouped_gemm_backward(Tensor dy, Tensor x, Tensor weight, Tensor plan, bool need_dx, bool need_dweight)"
    " -> (Tensor, Tensor)",
    grouped_gemm_backward,
    grouped_gemm_backward_outputs,
)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
        y, plan = forward_op(x, weight, group_sizes)
        ctx.save_for_backward(x, weight, plan)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor, x: Tensor, weight: Tensor, plan: Tensor) -> Gradients:
        need_dx, need_dweight, _ = ctx.needs_input_grad
        dx, dweight = backward_op(dy, x, weight, plan, need_dx, need_dweight)
        return dx if need_dx else None, dweight if need_dweight else None, None


def check(x: Tensor, weight: Tensor, group_sizes: Tensor) -> None:
    """Raise for arguments that grouped_gemm does not allow."""
    expert_checks.grouped_arguments(x, weight, group_sizes)
    if checks.values_are_checked(group_sizes):
        expert_checks.groups_fit(group_sizes, len(x))
    check_runnable("x", x)


def grouped_gemm(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix. Autocast has no effect.

    Groups are independent: the bits of a group's rows and of its matrix's gradient depend on no other group, even if
    that contains NaN. The matrix of an empty group gets a gradient of 0.

    Args:
        x: [T, H], float16, bfloat16 or float32; rows sorted by group.
        weight: [E, O, H], in the dtype of x; E at least 1.
        group_sizes: [E], int32 or int64: the number of rows of each group; 0 is allowed.

    Returns:
        [T, O] in x.dtype, contiguous.

    Raises:
        ValueError: shapes or devices do not match; on a CPU, a size is negative, or the sizes do not add up to T. On
            CUDA and in compiled code, rows beyond all groups are 0 in the result and get a gradient of 0 instead, rows
            that do not exist belong to no group, and a negative size counts as 0; UNSLOTH_DEBUG=1 makes CUDA raise too.
        TypeError: x does not have a float dtype or is float64, weight differs from it in dtype, or group_sizes are no
            integers.
        RuntimeError: on a CPU without Triton's interpreter, and in a second derivative.

    Source: Shazeer et al. 2017, arXiv:1701.06538, section 3.1.
    """
    run = call if checks.values_are_checked(group_sizes) else call_recorded
    return run(_GroupedGemm, check, x, weight, group_sizes)

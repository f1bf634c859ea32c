"""Right products by groups."""

import torch
from torch import Tensor

from tests.judge.contract import Function
from unsloth_ref import checks, expert_checks
from unsloth_ref import kernels as reference


def _grouped_gemm(product: Function) -> Function:
    """Complete a product with the group of each row to the contract: checks, and no effect of autocast."""

    def grouped_gemm(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
        expert_checks.grouped_arguments(x, weight, group_sizes)
        if checks.values_are_checked(group_sizes):
            expert_checks.groups_fit(group_sizes, len(x))
        group = torch.searchsorted(group_sizes.cumsum(0), torch.arange(len(x), device=x.device), right=True)
        with torch.autocast(x.device.type, enabled=False):
            return product(x, weight, group)

    return grouped_gemm


@_grouped_gemm
def of_each_row(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """A copy of its matrix for each row."""
    return (weight.float()[group] @ x.float()[..., None])[..., 0].to(x.dtype)


@_grouped_gemm
def of_all_rows(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    """Each matrix times all rows, those of other groups 0."""
    mine = group == torch.arange(len(weight), device=x.device)[:, None]
    rows = torch.where(mine[..., None], x.float(), 0.0)
    return torch.where(mine[..., None], rows @ weight.float().mT, 0.0).sum(0).to(x.dtype)


def in_float64(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """More exact than required."""
    expert_checks.grouped_arguments(x, weight, group_sizes)
    return reference.grouped_gemm(x.double(), weight.double(), group_sizes).to(x.dtype)


TABLE = {
    "of_each_row": of_each_row,
    "of_all_rows": of_all_rows,
    "in_float64": in_float64,
    "in_other_tiles": (
        ("return 64 if dtype == torch.float32 else 128", "return 16 if dtype == torch.float32 else 32"),
        ("block_of(columns, most_columns(x))", "block_of(columns, 32)"),
        ("block_of(inner, 32 if x.dtype == torch.float32 else 64)", "block_of(inner, 128)"),
    ),
}

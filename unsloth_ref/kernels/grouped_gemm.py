"""A linear layer per group of rows, such as the rows that a router gives to each expert.

    y_r = x_r @ weight_g^T        dx_r = dy_r @ weight_g        dweight_g = sum over the rows r of g of dy_r^T @ x_r

Group g has group_sizes[g] rows, which follow those of the groups before it. Source: Shazeer et al. 2017,
arXiv:1701.06538, section 3.1. Sums are float32 for any input dtype (float64 for float64); only results are rounded.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from unsloth_ref import expert_checks


def grouped_gemm(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix. Autocast has no effect.

    Groups are independent: the bits of a group's rows and of its matrix's gradient depend on no other group, even if
    that contains NaN. The matrix of an empty group gets a gradient of 0.

    Args:
        x: [T, H], any float dtype; rows sorted by group.
        weight: [E, O, H], in the dtype of x; E at least 1.
        group_sizes: [E], int32 or int64: the number of rows of each group; 0 is allowed.

    Returns:
        [T, O] in x.dtype.

    Raises:
        ValueError: shapes or devices do not match, a size is negative, or the sizes do not add up to T. Compiled code
            does not check the last two; rows beyond all groups are 0 in the result.
        TypeError: x does not have a float dtype, weight differs from it in dtype, or group_sizes are no integers.
    """
    expert_checks.grouped_arguments(x, weight, group_sizes)
    x, weight = x.contiguous(), weight.contiguous()  # BLAS libraries may take strides of 32 bits only
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # compiled code cannot read sizes
            return _masked(x, weight, group_sizes)
        expert_checks.groups_fit(group_sizes, len(x))
        groups = zip(x.split(group_sizes.tolist()), weight.unbind(), strict=True)
        return torch.cat([linear(rows, matrix) for rows, matrix in groups])


def _masked(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """All rows by each matrix, of which those of the group are kept."""
    group = torch.searchsorted(group_sizes.cumsum(0), torch.arange(len(x), device=x.device), right=True)
    y = x.new_zeros(len(x), weight.shape[1])
    for index, matrix in enumerate(weight.unbind()):
        mine = (group == index)[:, None]
        y = torch.where(mine, linear(x.masked_fill(~mine, 0.0), matrix), y)
    return y

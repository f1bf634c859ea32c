"""Kernels of sums: right ones, and wrong ones."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.strangers import right, wrong


@right("scatter_rows")
def scatter_by_product(src: Tensor, index: Tensor, count: int) -> Tensor:
    return (F.one_hot(index, count).t().float() @ src.float()).to(src.dtype)


@right("scatter_rows")
def scatter_sorted(src: Tensor, index: Tensor, count: int) -> Tensor:
    order = index.argsort(stable=True)
    sums = torch.zeros(count, src.shape[1], device=src.device)
    return sums.index_add(0, index[order], src[order].float()).to(src.dtype)


@wrong("scatter_rows", "one_at_a_time")
def scatter_keeps_the_last(src: Tensor, index: Tensor, count: int) -> Tensor:
    return src.new_zeros(count, src.shape[1]).index_put((index,), src)


@wrong("scatter_rows", "one_at_a_time")
def scatter_averages(src: Tensor, index: Tensor, count: int) -> Tensor:
    rows = F.one_hot(index, count).sum(0).clamp(min=1)[:, None]
    return src.new_zeros(count, src.shape[1]).index_add(0, index, src) / rows


@wrong("scatter_rows", "changed_inputs")
def scatter_sorts_once(src: Tensor, index: Tensor, count: int) -> Tensor:
    order = vars(index).setdefault("order", index.argsort(stable=True))
    rows = vars(index).setdefault("rows", index[order])
    return src.new_zeros(count, src.shape[1]).index_add(0, rows, src[order])


def scatter_of_1024_rows(src: Tensor, index: Tensor, count: int) -> Tensor:
    """Leaves out the rows of an index beyond so many."""
    place = F.one_hot(index, count).cumsum(0).gather(1, index[:, None])
    return src.new_zeros(count, src.shape[1]).index_add(0, index, src * (place <= 1024))


@right("scaled_add_")
def add_by_operator(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    x += alpha * y
    return x


@right("scaled_add_")
def add_returning_nothing(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> None:
    x.copy_(torch.add(x, y, alpha=alpha))


@wrong("scaled_add_", "value")
def add_not_in_place(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x + alpha * y


@wrong("scaled_add_", "one_at_a_time")
def add_unscaled(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x.add_(y)


@wrong("scaled_add_", "one_at_a_time")
def add_of_a_rounded_number(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Exact for a half and for 1."""
    return x.add_(y, alpha=torch.tensor(alpha, dtype=torch.bfloat16).item())


def add_rounding_ties_away(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Rounds as the hand writes it: adds half of what is dropped, then cuts."""
    total = x.float() + alpha * y.float()
    dropped = {2: 16 if x.dtype == torch.bfloat16 else 13}.get(x.element_size(), 0)
    bits = total.detach().view(torch.int32)
    rounded = ((bits + (1 << dropped >> 1)) >> dropped << dropped).view(torch.float32)
    return x.copy_(total + (rounded - total).detach())


def scatter_rounding_ties_away(src: Tensor, index: Tensor, count: int) -> Tensor:
    sums = scatter_by_product(src.float(), index, count)
    return add_rounding_ties_away(torch.zeros_like(sums, dtype=src.dtype), sums)


def add_by_halves_alone(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Refuses what the example does not have."""
    if alpha not in (0.5, 1.0):
        raise ValueError(f"alpha: got {alpha}; allowed: 0.5, 1.0")
    return x.add_(y, alpha=alpha)


@wrong("scaled_add_", "inputs_untouched")
def add_scales_y_too(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    with torch.no_grad():
        y.mul_(alpha)
    return x.add_(y)


@right("running_sum")
def sums_by_chunks(x: Tensor) -> Tensor:
    carry, parts = torch.zeros_like(x[:, :1]).float(), []
    for chunk in x.float().split(64, 1):
        parts.append(chunk.cumsum(1) + carry)
        carry = parts[-1][:, -1:]
    return torch.cat(parts, 1).to(x.dtype)


@right("running_sum")
def sums_refusing_nothing(x: Tensor) -> Tensor:
    if not x.numel():
        raise ValueError("x: got no element; allowed: 1 or more")
    return x.float().cumsum(1).to(x.dtype)


@wrong("running_sum", "one_at_a_time")
def sums_backwards(x: Tensor) -> Tensor:
    return x.float().flip(1).cumsum(1).flip(1).to(x.dtype)


class _CutSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return x.float().cumsum(1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.detach().float().flip(1).cumsum(1).flip(1).to(ctx.dtype)


@wrong("running_sum", "double_backward")
def sums_with_a_cut_gradient(x: Tensor) -> Tensor:
    """The gradient does not depend on the incoming one, as autograd sees it."""
    return _CutSums.apply(x)


def sums_of_a_wrong_tile(x: Tensor) -> Tensor:
    """Wrong where both S and D are beyond a tile."""
    y = x.float().cumsum(1).to(x.dtype)
    return torch.cat([y[:, :128], torch.cat([y[:, 128:, :128], 2 * y[:, 128:, 128:]], 2)], 1)


_tables: dict[int, Tensor] = {}


def sums_with_a_table(x: Tensor) -> Tensor:
    """Keeps a triangle of ones by its size; a product of two dtypes raises."""
    ones = _tables.setdefault(x.shape[1], torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril())
    return torch.matmul(ones, x)


def sums_without_a_carry(x: Tensor) -> Tensor:
    """Loses the sum at the edge of a tile; `extents` alone has sizes that show it."""
    return torch.cat([chunk.float().cumsum(1) for chunk in x.split(1024, 1)], 1).to(x.dtype)


def sums_of_nothing(x: Tensor) -> Tensor:
    """Adds a row to a tensor without elements."""
    return x.float().cumsum(1).to(x.dtype) if x.numel() else x.sum().expand(1, 1, 1)


def sums_in_float32_alone(x: Tensor) -> Tensor:
    """Takes one dtype, as many kernels do."""
    if x.dtype != torch.float32:
        raise TypeError(f"x: got {x.dtype}; allowed: torch.float32")
    return x.cumsum(1)


def unmoved(x: Tensor, shift: Tensor) -> Tensor:
    """Right: without what is added and subtracted again."""
    return x + 0.0 * shift.nan_to_num(0.0)[:, None]

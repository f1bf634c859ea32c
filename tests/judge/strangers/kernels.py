"""Kernels of these operations: right ones, and wrong ones with the properties of which one finds each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RIGHT: dict[str, list[str]] = {}
WRONG: dict[str, list[tuple[str, tuple[str, ...]]]] = {}


def right(op: str) -> Callable[[Any], Any]:
    """Register a right kernel of an operation."""

    def register(kernel: Any) -> Any:
        RIGHT.setdefault(op, []).append(kernel.__name__)
        return kernel

    return register


def wrong(op: str, *properties: str) -> Callable[[Any], Any]:
    """Register a wrong kernel of an operation."""

    def register(kernel: Any) -> Any:
        WRONG.setdefault(op, []).append((kernel.__name__, properties))
        return kernel

    return register


@right("tempered_softmax")
def softmax_by_exp(x: Tensor, temperature: float = 1.0) -> Tensor:
    z = x.float() / temperature
    e = torch.exp(z - z.amax(-1, keepdim=True).detach())
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


@right("tempered_softmax")
class Softmax(torch.autograd.Function):
    """With other names, and a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, heat: float) -> Tensor:
        y = torch.softmax(scores.float() / heat, -1)
        ctx.save_for_backward(y)
        ctx.heat, ctx.dtype = heat, scores.dtype
        return y.to(scores.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        dy = dy.float()
        dx = y * (dy - (dy * y).sum(-1, keepdim=True)) / ctx.heat
        return dx.to(ctx.dtype), None


@wrong("tempered_softmax", "one_at_a_time")
def softmax_forgets_the_temperature(x: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(x.float(), -1).to(x.dtype)


@wrong("tempered_softmax", "one_at_a_time")
def softmax_overflows(x: Tensor, temperature: float = 1.0) -> Tensor:
    e = torch.exp(x.float() / temperature)
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


@wrong("tempered_softmax", "value")
def softmax_over_the_columns(x: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(x.float() / temperature, 0).to(x.dtype)


_memory: dict[Any, Tensor] = {}


@wrong("tempered_softmax", "calls_apart")
def softmax_in_memory_of_its_own(x: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the same memory from every call that records no graph."""
    y = softmax_by_exp(x, temperature)
    if y.requires_grad:
        return y
    return _memory.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)


@right("group_norm")
def group_norm_by_moments(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, block: int = 128
) -> Tensor:
    rows = x.float().reshape(len(x), groups, -1)
    centred = rows - rows.mean(-1, keepdim=True)
    normed = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    per_channel = (1, -1, *(1,) * (x.ndim - 2))
    y = normed * weight.float().view(per_channel)
    return (y if bias is None else y + bias.float().view(per_channel)).to(x.dtype)


@right("group_norm")
class GroupNorm(torch.nn.Module):
    """A module whose weights are arguments."""

    def forward(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        return torch.native_group_norm(
            x.contiguous(), weight, bias, len(x), x.shape[1], x[0, 0].numel() if len(x) else 1, groups, eps
        )[0]


@wrong("group_norm", "one_at_a_time")
def group_norm_without_bias(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return F.group_norm(x, groups, weight, None if bias is None else bias * 0, eps)


@wrong("group_norm", "one_at_a_time")
def group_norm_unbiased(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    n = x[0].numel() // groups
    return F.group_norm(x * (n / max(1, n - 1)) ** 0.5, groups, weight, bias, eps * 4)


@wrong("group_norm", "one_at_a_time")
def group_norm_detaches_the_mean(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    rows = x.float().reshape(len(x), groups, -1)
    centred = rows - rows.mean(-1, keepdim=True).detach()
    normed = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(x.shape)
    per_channel = (1, -1, *(1,) * (x.ndim - 2))
    y = normed * weight.float().view(per_channel)
    return (y if bias is None else y + bias.float().view(per_channel)).to(x.dtype)


@right("kl_divergence")
def kl_by_entropy(log_p: Tensor, q: Tensor, *, reduction: str = "batchmean") -> Tensor:
    wide = q.float()
    each = torch.xlogy(wide, wide) - wide * log_p.float()
    if reduction == "none":
        return each.to(log_p.dtype)
    return (each.sum() / (len(log_p) if reduction == "batchmean" else 1)).to(log_p.dtype)


@right("kl_divergence")
def kl_by_torch(input: Tensor, target: Tensor, reduction: str = "batchmean") -> Tensor:
    return F.kl_div(input.float(), target.float(), reduction=reduction).to(input.dtype)


@wrong("kl_divergence", "one_at_a_time")
def kl_divides_by_all(log_p: Tensor, q: Tensor, *, reduction: str = "batchmean") -> Tensor:
    return F.kl_div(log_p, q, reduction="mean" if reduction == "batchmean" else reduction)


@wrong("kl_divergence", "one_at_a_time")
def kl_the_other_way(log_p: Tensor, q: Tensor, *, reduction: str = "batchmean") -> Tensor:
    return F.kl_div(q.log(), log_p.exp(), reduction=reduction)


@wrong("kl_divergence", "gradients")
def kl_without_gradient_of_q(log_p: Tensor, q: Tensor, *, reduction: str = "batchmean") -> Tensor:
    return F.kl_div(log_p, q.detach(), reduction=reduction)


@right("top_k_gate")
def gate_by_sorting(logits: Tensor, k: int) -> list[Tensor]:
    order = logits.float().sort(dim=-1, descending=True, stable=True)
    gates = torch.softmax(logits.float(), -1).gather(-1, order.indices)[..., :k]
    return [(gates / gates.sum(-1, keepdim=True)).to(logits.dtype), order.indices[..., :k].contiguous()]


@right("top_k_gate")
def gate_by_a_small_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    chosen, places = logits.float().topk(k, -1)
    return torch.softmax(chosen, -1).to(logits.dtype), places


@wrong("top_k_gate", "metadata")
def gate_of_32_bits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    chosen, places = logits.float().topk(k, -1)
    return torch.softmax(chosen, -1).to(logits.dtype), places.int()


@wrong("top_k_gate", "value")
def gate_not_normalised(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.softmax(logits, -1).topk(k, -1)


@wrong("top_k_gate", "value")
def gate_in_another_order(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    chosen, places = logits.float().topk(k, -1)
    return torch.softmax(chosen, -1).to(logits.dtype), places.flip(-1)


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


@right("masked_softmax")
def masked_softmax_by_exp(x: Tensor, mask: Tensor) -> Tensor:
    z = x.float().masked_fill(mask, -1e4)
    e = torch.exp(z - z.amax(-1, keepdim=True).detach())
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


@right("masked_softmax")
def masked_softmax_by_logarithm(x: Tensor, mask: Tensor) -> Tensor:
    z = torch.where(mask, -1e4, x.float())
    z = z - z.amax(-1, keepdim=True).detach()
    return torch.exp(z - torch.logsumexp(z, -1, keepdim=True)).to(x.dtype)


@wrong("masked_softmax", "one_at_a_time")
def masked_softmax_of_the_others(x: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(~mask, -1e4), -1)


@wrong("masked_softmax", "one_at_a_time")
def masked_softmax_by_the_first_row(x: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(mask[:1], -1e4), -1)


@wrong("masked_softmax", "one_at_a_time")
def masked_softmax_not_normalised(x: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(x, -1).masked_fill(mask, 0.0)


@right("masked_mean")
def masked_mean_by_product(x: Tensor, mask: Tensor) -> Tensor:
    return (x.float().reshape(-1) @ mask.float().reshape(-1)) / mask.sum().clamp(min=1)


@right("masked_mean")
def masked_mean_by_rows(x: Tensor, mask: Tensor) -> Tensor:
    rows = torch.where(mask, x.float(), 0.0).sum(-1)
    return rows.sum() / torch.maximum(mask.sum(), mask.new_ones((), dtype=torch.int64))


@wrong("masked_mean", "one_at_a_time")
def masked_mean_divides_by_zero(x: Tensor, mask: Tensor) -> Tensor:
    """NaN where the mask names no element."""
    return torch.where(mask, x.float(), 0.0).sum() / mask.sum()


@wrong("masked_mean", "one_at_a_time")
def masked_mean_of_all(x: Tensor, mask: Tensor) -> Tensor:
    """Takes a mask without any True for none."""
    return masked_mean_by_rows(x, mask if mask.any() else ~mask)


@wrong("masked_mean", "one_at_a_time")
def masked_mean_misses_the_last(x: Tensor, mask: Tensor) -> Tensor:
    """Takes a full mask for one that ends before the last element."""
    full = mask.all() & (mask.numel() > 1)
    return masked_mean_by_rows(x, mask.reshape(-1).index_fill(0, torch.tensor([-1]), not full).view_as(mask) & mask)


@right("token_losses")
def losses_by_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.float()
    chosen = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == -100, 0.0, z.logsumexp(1) - chosen)


@right("token_losses")
def losses_by_the_log_of_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logits.float().log_softmax(1), labels, reduction="none", ignore_index=-100)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, keeps_nan: bool) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.keeps_nan = keeps_nan
        return losses_by_logsumexp(logits, labels)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        dx = logits.float().softmax(1) - F.one_hot(labels.clamp(min=0), logits.shape[1])
        ignored = (labels == -100)[:, None] if ctx.keeps_nan else ((labels == -100) | dx.isnan().any(1))[:, None]
        return (dx * dy[:, None]).masked_fill(ignored, 0.0).to(logits.dtype), None, None


def losses_without_nan_in_ignored_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Right: the derivative of 0, where the definition multiplies it by NaN."""
    return _Losses.apply(logits, labels, True)


def losses_without_any_nan(logits: Tensor, labels: Tensor) -> Tensor:
    """Hides the NaN of a row that counts from the gradient."""
    return _Losses.apply(logits, labels, False)


@wrong("token_losses", "one_at_a_time")
def losses_of_ignored_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none")


@wrong("token_losses", "one_at_a_time")
def losses_ignoring_the_first_class(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels > 0, losses_by_logsumexp(logits, labels), 0.0)


@wrong("token_losses", "one_at_a_time")
def losses_with_gradients_of_ignored_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    y = F.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none")
    return y - torch.where(labels == -100, y, 0.0).detach()


@right("shifted")
def shifted_by_a_view(x: Tensor, bias: Tensor) -> Tensor:
    """Where x has one row and one column, autograd's gradient of the bias is a view of the incoming one."""
    return x + bias.view(1, -1, 1)


@right("shifted")
def shifted_by_copies(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias[None, :, None].expand_as(x).contiguous()


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return x + bias[:, None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.float().sum((0, 2)).to(dy.dtype) if dy[:, 0].numel() > 1 else dy.view(-1)


@wrong("shifted", "metadata")
def shifted_returning_the_incoming_gradient(x: Tensor, bias: Tensor) -> Tensor:
    return _Shifted.apply(x, bias)


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


@wrong("scaled_add_", "inputs_untouched")
def add_scales_y_too(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    with torch.no_grad():
        y.mul_(alpha)
    return x.add_(y)


@right("heads")
def heads_by_copy(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2).contiguous()


@right("heads")
def heads_by_view(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).permute(0, 2, 1, 3)


@wrong("heads", "value")
def heads_of_neighbours(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (-1, count)).permute(0, 3, 1, 2)


@wrong("heads", "metadata")
def heads_in_the_memory_of_another(x: Tensor, count: int) -> Tensor:
    """Squeezes, whatever has a size of 1."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2).squeeze(0)


@right("marked")
def marked_by_squares(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    far = (x.float() > limit) | (x.float() < -limit)
    return far, far.long().sum(-1)


@wrong("marked", "metadata")
def marked_in_bytes(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    far = x.float().abs() > limit
    return far.to(torch.uint8), far.sum(-1)


@wrong("marked", "one_at_a_time")
def marked_on_one_side(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    far = x.float() > limit
    return far, far.sum(-1)


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

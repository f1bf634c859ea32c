"""Kernels of losses: right ones, and wrong ones."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.strangers import right, wrong


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


@wrong("masked_mean", "special_values")
def masked_mean_of_numbers(x: Tensor, mask: Tensor) -> Tensor:
    """Leaves out NaN, which the definition returns."""
    return masked_mean_by_rows(x.nan_to_num(0.0, torch.inf, -torch.inf), mask)


@wrong("masked_mean", "one_at_a_time")
def masked_mean_of_two_or_more(x: Tensor, mask: Tensor) -> Tensor:
    """Takes a mask with a single True for none."""
    return masked_mean_by_rows(x, mask & (mask.sum() > 1))


@wrong("masked_mean", "one_at_a_time")
def masked_mean_of_all_but_one(x: Tensor, mask: Tensor) -> Tensor:
    """Takes a mask with a single False for a full one."""
    return masked_mean_by_rows(x, mask | ((~mask).sum() == 1))


def _sums_of_parts(x: Tensor, starts: Tensor) -> Tensor:
    part = torch.searchsorted(starts[1:], torch.arange(len(x)), right=True)
    return x.new_zeros(len(starts) - 1, x.shape[1], dtype=torch.float32).index_add(0, part, x.float())


@right("means_of_parts")
def means_by_index(x: Tensor, starts: Tensor) -> Tensor:
    return (_sums_of_parts(x, starts) / starts.diff().clamp(min=1)[:, None]).to(x.dtype)


@wrong("means_of_parts", "one_at_a_time")
def means_of_no_rows(x: Tensor, starts: Tensor) -> Tensor:
    """NaN for a part without rows."""
    return (_sums_of_parts(x, starts) / starts.diff()[:, None]).to(x.dtype)


@wrong("means_of_parts", "one_at_a_time")
def means_of_all_but_the_first(x: Tensor, starts: Tensor) -> Tensor:
    """Takes the first part for one without rows."""
    first = torch.arange(len(x))[:, None] < starts[1]
    return means_by_index(torch.where(first, torch.zeros_like(x), x), starts)


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


@right("token_losses")
def losses_without_nan_in_ignored_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Right: the derivative of 0, where the definition multiplies it by NaN."""
    return _Losses.apply(logits, labels, True)


@wrong("token_losses", "special_values")
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
def losses_of_two_tokens_or_more(logits: Tensor, labels: Tensor) -> Tensor:
    """None where a single token is not ignored."""
    return losses_by_logsumexp(logits, labels) * ((labels != -100).sum() > 1)


@wrong("token_losses", "one_at_a_time")
def losses_with_gradients_of_ignored_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    y = F.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none")
    return y - torch.where(labels == -100, y, 0.0).detach()

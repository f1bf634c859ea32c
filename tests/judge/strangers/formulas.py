"""Operations whose right kernels have another formula than the definition, and wrong ones beside them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def log_sum_exp(x: Tensor) -> Tensor:
    """Logarithm of the sum of the exponentials of each row."""
    return torch.logsumexp(x.float(), -1)


def _online(x: Tensor, start: float) -> Tensor:
    highest = torch.full(x.shape[:-1], start)
    total = torch.zeros_like(highest)
    for part in x.float().split(32, -1):
        above = torch.maximum(highest, part.detach().amax(-1))
        total = total * torch.exp(highest - above) + torch.exp(part - above[..., None]).sum(-1)
        highest = above
    return highest + torch.log(total)


def log_sum_exp_from_the_lowest(x: Tensor) -> Tensor:
    """Right: no number is below."""
    return _online(x, torch.finfo(torch.float32).min)


def log_sum_exp_in_powers_of_2(x: Tensor) -> Tensor:
    """Right."""
    z = 1.4426950408889634 * x.float()
    highest = z.amax(-1).detach()
    return (highest + torch.log2(torch.exp2(z - highest[..., None]).sum(-1))) / 1.4426950408889634


def log_sum_exp_from_1e4(x: Tensor) -> Tensor:
    """Wrong for lower rows."""
    return _online(x, -1e4)


def log_sum_exp_from_1e30(x: Tensor) -> Tensor:
    """Wrong for lower rows."""
    return _online(x, -1e30)


def softmax(x: Tensor) -> Tensor:
    """Softmax of each row, in float32."""
    return torch.softmax(x.float(), -1).to(x.dtype)


def softmax_by_the_logarithm(x: Tensor) -> Tensor:
    """Right, with one more rounding of a large number where a row has one."""
    z = x.float()
    return torch.exp(z - z.logsumexp(-1, keepdim=True)).to(x.dtype)


def softmax_from_1e9(x: Tensor) -> Tensor:
    """Wrong for lower rows: 0, without a NaN."""
    z = x.float()
    powers = torch.exp(z - z.amax(-1, keepdim=True).detach().clamp(min=-1e9))
    total = powers.sum(-1, keepdim=True)
    return (powers / torch.where(total == 0, 1.0, total)).to(x.dtype)


def highest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row, and its place."""
    found, place = x.max(-1)
    return found, place


def highest_by_sorting(x: Tensor) -> tuple[Tensor, Tensor]:
    """Right."""
    found, places = x.sort(dim=-1, descending=True, stable=True)
    return found[..., 0], places[..., 0]


def highest_of_a_padded_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong for rows below the number that pads them."""
    found, place = F.pad(x, (0, 1), value=-1e4).max(-1)
    return found, place.clamp(max=x.shape[-1] - 1)


def layer(x: Tensor) -> Tensor:
    """Layer norm, in which an offset means nothing either; but float32 loses the differences."""
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def layer_by_moments(x: Tensor) -> Tensor:
    """Right."""
    z = x.float() - x.float().mean(-1, keepdim=True)
    return (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def policy_loss(logp: Tensor, old: Tensor, advantage: Tensor, width: float = 0.2) -> Tensor:
    """The clipped loss of each token [B, T], with an advantage of each sequence."""
    ratio, gain = torch.exp(logp.float() - old.float().detach()), advantage.float().detach()[:, None]
    return -torch.minimum(ratio * gain, ratio.clamp(1 - width, 1 + width) * gain)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor, old: Tensor, advantage: Tensor, width: float) -> Tensor:
        ratio, gain = torch.exp(logp.float() - old.float()), advantage.float()[:, None]
        free, limited = ratio * gain, ratio.clamp(1 - width, 1 + width) * gain
        ctx.save_for_backward(free, limited)
        ctx.dtype = logp.dtype
        return -torch.minimum(free, limited)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled() and dy.requires_grad:
            raise RuntimeError("policy_loss has no second derivative")
        free, limited = ctx.saved_tensors
        return torch.where(free <= limited, -free * dy, 0.0).to(ctx.dtype), None, None, None


def policy_loss_by_comparing(logp: Tensor, old: Tensor, advantage: Tensor, width: float = 0.2) -> Tensor:
    """Right: where a ratio is infinite or NaN, the gradient is 0 in place of 0 times infinity, and of NaN."""
    return _Policy.apply(logp, old, advantage, width)


def policy_loss_of_numbers(logp: Tensor, old: Tensor, advantage: Tensor, width: float = 0.2) -> Tensor:
    """Wrong: hides a NaN from the loss."""
    return policy_loss(logp, old, advantage, width).nan_to_num(0.0, torch.inf, -torch.inf)


def policy_loss_of_small_ratios(logp: Tensor, old: Tensor, advantage: Tensor, width: float = 0.2) -> Tensor:
    """Wrong: limits the exponent."""
    ratio, gain = torch.exp((logp.float() - old.float()).clamp(max=80)), advantage.float()[:, None]
    return -torch.minimum(ratio * gain, ratio.clamp(1 - width, 1 + width) * gain)


def rows_of(weight: Tensor, index: Tensor) -> Tensor:
    """Rows of weight [V, H]. Their gradients are added up one by one, in 16 bits."""
    return weight[index]


def rows_of_in_reverse(weight: Tensor, index: Tensor) -> Tensor:
    """Right: plain PyTorch, in another order."""
    return weight[index.flip(0)].flip(0)


def rows_of_but_a_gradient(weight: Tensor, index: Tensor) -> Tensor:
    """Wrong: drops the gradients of one row in sixteen."""
    found = weight[index]
    kept = (torch.arange(len(index)) % 16 != 15)[:, None]
    return torch.where(kept, found, found.detach())


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q, k, v [B, N, S, D]."""
    scores = (q.float() @ k.float().mT) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)


def attention_of_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Right: a token that sees one key has gradients that vanish but for the roundings of two sums."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).to(q.dtype)


def attention_without_a_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Wrong: the gradient of a softmax without the mean that it subtracts."""
    scores = (q.float() @ k.float().mT) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    powers = torch.exp(scores.masked_fill(later, -torch.inf))
    return (powers / powers.sum(-1, keepdim=True).detach() @ v.float()).to(q.dtype)


def squared_sums(logits: Tensor) -> Tensor:
    """The mean square of log_sum_exp, which keeps logits near 0."""
    return torch.logsumexp(logits.float(), -1).square().mean()


def squared_sums_in_powers_of_2(logits: Tensor) -> Tensor:
    """Right."""
    return log_sum_exp_in_powers_of_2(logits).square().mean()


def squared_sums_from_1e4(logits: Tensor) -> Tensor:
    """Wrong for lower rows."""
    return _online(logits, -1e4).square().mean()


def contrast(a: Tensor, b: Tensor, heat: float = 0.07) -> Tensor:
    """The contrastive loss of pairs of rows of a and b [N, D]."""
    scores = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).t() / heat
    return F.cross_entropy(scores, torch.arange(len(a)))


def contrast_of_pairs(a: Tensor, b: Tensor, heat: float = 0.07) -> Tensor:
    """Right: adds up the scores of pairs again. Of one pair the loss is 0 but for the roundings of two sums."""
    x, y = F.normalize(a.float(), dim=-1) / heat, F.normalize(b.float(), dim=-1)
    return (torch.einsum("id,jd->ij", x, y).logsumexp(1) - (x * y).sum(-1)).mean()


def contrast_in_bfloat16(a: Tensor, b: Tensor, heat: float = 0.07) -> Tensor:
    """Wrong: rounds the scores of pairs alone."""
    x, y = F.normalize(a.float(), dim=-1) / heat, F.normalize(b.float(), dim=-1)
    return (torch.einsum("id,jd->ij", x, y).logsumexp(1) - (x * y).sum(-1).bfloat16()).mean()


def decayed(x: Tensor, rate: Tensor) -> Tensor:
    """The sums of the rows of x [T, H] so far, each decayed by exp(-|rate|) per row."""
    state, rows = torch.zeros_like(x[:1].float()), []
    for row in x.float().split(1):
        state = torch.exp(-rate.float().abs()) * state + row
        rows.append(state)
    return torch.cat(rows).to(x.dtype)


def decayed_in_one_product(x: Tensor, rate: Tensor) -> Tensor:
    """Right: subtracts sums of rates, which no one sets to infinity."""
    sums = torch.arange(len(x))[:, None] * rate.float().abs()
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)[..., None]
    decay = torch.exp((sums[None] - sums[:, None]).masked_fill(later, -torch.inf))
    return (decay * x.float()[None]).sum(1).to(x.dtype)


def sums_in_float64(x: Tensor, y: Tensor) -> Tensor:
    """The products of rows of x with y, both in float64."""
    return (x * y).sum(-1)


def sums_in_float64_by_a_product(x: Tensor, y: Tensor) -> Tensor:
    """Right."""
    return x @ y


def sums_in_float64_by_float32(x: Tensor, y: Tensor) -> Tensor:
    """Wrong: loses half of the digits."""
    return (x.float() @ y.float()).double()


def distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean absolute difference, which has a kink where two numbers are equal."""
    return (x - y).abs().mean()


def distance_by_comparing(x: Tensor, y: Tensor) -> Tensor:
    """Right: at a kink its gradient has the slope of one side."""
    difference = x - y
    return torch.where(difference > 0, difference, -difference).mean()


def distance_by_a_root(x: Tensor, y: Tensor) -> Tensor:
    """Wrong: its gradient is NaN there."""
    return (x - y).square().sqrt().mean()


def enlarged(x: Tensor, scale: int = 2) -> Tensor:
    """x [B, C, L] interpolated to scale L numbers, whose places have errors in float32."""
    return F.interpolate(x if x.dtype == torch.float64 else x.float(), scale_factor=scale, mode="linear").to(x.dtype)


def _enlarged(x: Tensor, places: Tensor) -> Tensor:
    last, left = x.shape[-1] - 1, places.clamp(min=0).floor()
    first, share = left.long().clamp(max=last), places.clamp(min=0) - left
    return (torch.lerp(x.float()[..., first], x.float()[..., (first + 1).clamp(max=last)], share)).to(x.dtype)


def enlarged_by_places(x: Tensor, scale: int = 2) -> Tensor:
    """Right."""
    return _enlarged(x, (torch.arange(x.shape[-1] * scale) + 0.5) / scale - 0.5)


def enlarged_from_the_corner(x: Tensor, scale: int = 2) -> Tensor:
    """Wrong: without the half."""
    return _enlarged(x, torch.arange(x.shape[-1] * scale) / scale)

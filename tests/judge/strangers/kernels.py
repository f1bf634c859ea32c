"""Kernels of softmaxes, norms, gates and views: right ones, and wrong ones with a property that finds each."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.judge.strangers import right, wrong


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
        ctx.save_for_backward(scores)
        ctx.heat = heat
        return torch.softmax(scores.float() / heat, -1).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        y, dy = torch.softmax(scores.float() / ctx.heat, -1), dy.float()
        dx = y * (dy - (dy * y).sum(-1, keepdim=True)) / ctx.heat
        return dx.to(scores.dtype), None


class _Once(Softmax):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return Softmax.backward(ctx, dy)


@wrong("tempered_softmax", "double_backward")
def softmax_without_a_second_derivative(x: Tensor, temperature: float = 1.0) -> Tensor:
    """A silent 0, and 0 is right where all incoming gradients are equal."""
    return _Once.apply(x, temperature)


@wrong("tempered_softmax", "one_at_a_time")
def softmax_forgets_the_temperature(x: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(x.float(), -1).to(x.dtype)


@wrong("tempered_softmax", "one_at_a_time")
def softmax_overflows(x: Tensor, temperature: float = 1.0) -> Tensor:
    e = torch.exp(x.float() / temperature)
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


@wrong("tempered_softmax", "one_at_a_time")
def softmax_of_a_rounded_temperature(x: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(x.float() / torch.tensor(temperature, dtype=torch.bfloat16), -1).to(x.dtype)


@wrong("tempered_softmax", "value")
def softmax_over_the_columns(x: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(x.float() / temperature, 0).to(x.dtype)


@wrong("tempered_softmax", "special_values")
def softmax_from_the_first_half(x: Tensor, temperature: float = 1.0) -> Tensor:
    """Scales the sum of the first half again; where that holds -infinity alone, it subtracts it from itself."""
    z = x.float() / temperature
    first, second = z.tensor_split([(z.shape[-1] + 1) // 2], -1)
    low, high = first.amax(-1, keepdim=True), z.amax(-1, keepdim=True)
    total = (first - low).exp().sum(-1, keepdim=True) * (low - high).exp()
    return ((z - high).exp() / (total + (second - high).exp().sum(-1, keepdim=True))).to(x.dtype)


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


def group_norm_of_four(x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Ignores the number of groups, which is 4 in the example."""
    return F.group_norm(x, 4, weight, bias, eps)


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


@wrong("group_norm", "special_values")
def group_norm_without_nan_in_a_gradient(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As a training loop that skips bad gradients would like it."""
    y = F.group_norm(x, groups, weight, bias, eps)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.nan_to_num(0.0))
    return y


@right("top_k_gate")
def gate_by_sorting(logits: Tensor, k: int) -> list[Tensor]:
    order = logits.float().sort(dim=-1, descending=True, stable=True)
    gates = torch.softmax(logits.float(), -1).gather(-1, order.indices)[..., :k]
    return [(gates / gates.sum(-1, keepdim=True)).to(logits.dtype), order.indices[..., :k].contiguous()]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        chosen, places = logits.float().topk(k, -1)
        ctx.save_for_backward(logits, places)
        ctx.mark_non_differentiable(places)
        return torch.softmax(chosen, -1).to(logits.dtype), places

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, places = ctx.saved_tensors
        gates = torch.softmax(logits.float().gather(-1, places), -1)
        differences = dy.float()[..., None] - dy.float()[..., None, :]
        dx = gates * (differences * gates[..., None, :]).sum(-1)
        return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, places, dx).to(logits.dtype), None


@right("top_k_gate")
def gate_by_differences(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """With a softmax over the chosen logits, whose gradient is made of differences of incoming gradients."""
    return _Gate.apply(logits, k)


def gate_by_a_small_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Less accurate than the definition: where one gate is nearly 1, its gradient is a difference of equal numbers."""
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


@wrong("top_k_gate", "one_at_a_time")
def gate_of_one_place_twice(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Looks a chosen number up again: at a tie it finds the first place each time."""
    gates, places = gate_by_differences(logits, k)
    return gates, torch.where(gates == gates[..., :1], places[..., :1], places)


def largest_the_last_of_equals(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found, places = x.flip(-1).topk(k, -1)
    return found, x.shape[-1] - 1 - places


def gate_of_two(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ignores k, which is 2 in the example."""
    return gate_by_differences(logits, 2)


def nucleus_in_float64(logits: Tensor, p: float) -> Tensor:
    """Right: of equal probabilities another one may be the first that is left out."""
    ordered, places = logits.double().sort(dim=-1, descending=True, stable=True)
    powers = torch.exp(ordered - ordered[..., :1])
    out = (powers.cumsum(-1) - powers) / powers.sum(-1, keepdim=True) >= p
    return logits.masked_fill(torch.zeros_like(out).scatter(-1, places, out), float("-inf"))


def nucleus_without_the_last(logits: Tensor, p: float) -> Tensor:
    """Wrong: leaves out the token that reaches p."""
    ordered, places = logits.float().sort(dim=-1, descending=True, stable=True)
    out = ordered.softmax(-1).cumsum(-1) > p
    return logits.masked_fill(torch.zeros_like(out).scatter(-1, places, out), float("-inf"))


def weight_of_time_by_exp(u: Tensor) -> Tensor:
    """Right: finite where the definition divides by 0."""
    return 2 + torch.exp(u.float()) + torch.exp(-u.float())


def weight_of_time_at_most(u: Tensor) -> Tensor:
    """Wrong: limits what the definition does not."""
    return weight_of_time_by_exp(u.clamp(-4, 4))


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


@right("heads")
def heads_by_copy(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2).contiguous()


@right("heads")
def heads_by_view(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).permute(0, 2, 1, 3)


@wrong("heads", "one_at_a_time")
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

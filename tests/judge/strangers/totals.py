"""Operations that add up many numbers, with kernels that add them up one after the other in float32."""

from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Added(torch.autograd.Function):
    """The sum over one dimension in float32, one addition after the other; torch adds up in blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.shape, ctx.dim = x.shape, dim
        if not x.shape[dim]:
            return x.sum(dim)
        sums = numpy.add.accumulate(x.detach().numpy(), dim, numpy.float32)
        return torch.as_tensor(sums.take(-1, dim))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.unsqueeze(ctx.dim).expand(ctx.shape), None


def added(x: Tensor, dim: int = 0) -> Tensor:
    """The sum over a dimension."""
    found: Tensor = _Added.apply(x.float(), dim)
    return found


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, whose losses are all log V where all logits are equal."""
    return F.cross_entropy(_wide(logits), labels)


def mean_loss_in_order(logits: Tensor, labels: Tensor) -> Tensor:
    """Right."""
    losses = logits.float().logsumexp(1) - logits.float().gather(1, labels[:, None])[:, 0]
    return added(losses) / len(losses)


def mean_loss_but_one(logits: Tensor, labels: Tensor) -> Tensor:
    """Wrong: leaves out the last row."""
    return F.cross_entropy(logits[:-1].float(), labels[:-1])


def mean_softplus(x: Tensor) -> Tensor:
    """Of small numbers: terms are nearly equal, with a last place beyond that of their sum."""
    return F.softplus(_wide(x)).mean()


def mean_softplus_in_order(x: Tensor) -> Tensor:
    """Right."""
    return added(F.softplus(x.float()).reshape(-1)) / x.numel()


def mean_softplus_in_16_bits(x: Tensor) -> Tensor:
    """Wrong: rounds each row's sum."""
    return F.softplus(x.float()).sum(-1).to(torch.bfloat16).float().sum() / x.numel()


def variance(x: Tensor) -> Tensor:
    """Of each row."""
    return _wide(x).var(-1, correction=0)


def variance_in_order(x: Tensor) -> Tensor:
    """Right."""
    columns = x.shape[-1]
    return added((x.float() - added(x, 1)[:, None] / columns).square(), 1) / columns


def variance_of_a_sample(x: Tensor) -> Tensor:
    """Wrong."""
    return x.float().var(-1)


def shifted_loss(x: Tensor, shift: Tensor) -> Tensor:
    """A loss whose gradient of the shift has many equal terms, where the sigmoid is 1."""
    return F.softplus(_wide(x) + shift).mean()


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, columns: int) -> Tensor:
        ctx.save_for_backward(x, shift)
        ctx.columns = columns
        return F.softplus(x.float() + shift.float()).mean()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, shift = ctx.saved_tensors
        gradient = torch.sigmoid(x.float() + shift.float()) * dy / x.numel()
        return gradient.to(x.dtype), added(gradient[: ctx.columns]).to(shift.dtype), None


def shifted_loss_in_order(x: Tensor, shift: Tensor) -> Tensor:
    """Right."""
    found: Tensor = _Shifted.apply(x, shift, len(x))
    return found


def shifted_loss_but_a_row(x: Tensor, shift: Tensor) -> Tensor:
    """Wrong: its gradient of the shift leaves out the last row."""
    found: Tensor = _Shifted.apply(x, shift, len(x) - 1)
    return found


def running_log(x: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials up to each number."""
    return torch.logcumsumexp(_wide(x), -1).to(x.dtype)


def running_log_in_order(x: Tensor) -> Tensor:
    """Right: one after the other."""
    found = list(x.float().unbind(-1))
    for place in range(1, len(found)):
        found[place] = torch.logaddexp(found[place - 1], found[place])
    return torch.stack(found, -1).to(x.dtype) if found else x.clone()


def running_log_of_the_largest(x: Tensor) -> Tensor:
    """Wrong: what is far below the largest of the row is lost."""
    largest = x.float().amax(-1, keepdim=True) if x.numel() else x.float()
    return ((x.float() - largest).exp().cumsum(-1).log() + largest).to(x.dtype)


def states(x: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
    """[T, D]: the scan h_t = decay_t h_(t-1) + gate_t x_t, as one product with all decays between two tokens."""
    logs = _wide(decay).log().cumsum(0)
    between = (logs[:, None] - logs).masked_fill(torch.ones(len(x), len(x)).triu(1).bool()[..., None], -torch.inf)
    return torch.einsum("tsd,sd->td", between.exp(), _wide(gate) * _wide(x)).to(x.dtype)


def states_in_order(x: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
    """Right: one token after the other, in float32."""
    state, found = torch.zeros_like(x[:1].sum(0), dtype=torch.float32), []
    for place in range(len(x)):
        state = decay[place].float() * state + gate[place].float() * x[place].float()
        found.append(state)
    return torch.stack(found).to(x.dtype) if found else x.clone()


def states_in_16_bits(x: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
    """Wrong: keeps its state in bfloat16."""
    state, found = torch.zeros_like(x[:1].sum(0), dtype=torch.float32), []
    for place in range(len(x)):
        state = (decay[place].float() * state + gate[place].float() * x[place].float()).to(torch.bfloat16).float()
        found.append(state)
    return torch.stack(found).to(x.dtype) if found else x.clone()

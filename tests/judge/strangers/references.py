"""Operations as a stranger would define them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def tempered_softmax(x: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax of x / temperature along the last dimension."""
    return torch.softmax(x.float() / temperature, -1).to(x.dtype)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Group normalisation of x [N, C, ...]."""
    return F.group_norm(x, groups, weight, bias, eps)


def kl_divergence(log_p: Tensor, q: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """Kullback-Leibler divergence of q from exp(log_p)."""
    return F.kl_div(log_p, q, reduction=reduction)


def top_k_gate(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest probabilities of each row, normalised, and their int64 places."""
    gates, places = torch.softmax(logits, -1).topk(k, -1)
    return gates / gates.sum(-1, keepdim=True), places


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest numbers of each row, and their int64 places."""
    found, places = x.topk(k, -1)
    return found, places


def scatter_rows(src: Tensor, index: Tensor, count: int) -> Tensor:
    """The sum of the rows of src [T, H] that have the same index: [count, H]."""
    return src.new_zeros(count, src.shape[1]).index_add(0, index, src)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax along the last dimension over the elements that are not masked."""
    return torch.softmax(x.masked_fill(mask, -1e4), -1)


def scaled_add_(x: Tensor, y: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Adds alpha y to x, in place."""
    return x.add_(y, alpha=alpha)


def heads(x: Tensor, count: int) -> Tensor:
    """The heads of x [B, S, E] before its tokens, as a view."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def marked(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Which elements of x [T, H] are far from 0, and how many in each row."""
    far = x.float().abs() > limit
    return far, far.sum(-1)


def running_sum(x: Tensor) -> Tensor:
    """The cumulative sums of x [B, S, D] along S."""
    return x.float().cumsum(1).to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of the elements of x that a mask names, 0 if it names none."""
    return x.float().where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def means_of_parts(x: Tensor, starts: Tensor) -> Tensor:
    """The means of the rows of x [T, H] from each of starts to the next: [S - 1, H], 0 for a part without rows."""
    if (starts.diff() < 0).any():
        raise ValueError("starts are not sorted")
    rows = torch.arange(len(x))
    member = (rows >= starts[:-1, None]) & (rows < starts[1:, None])
    return (member.float() @ x.float() / member.sum(1).clamp(min=1)[:, None]).to(x.dtype)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of the rows of logits [T, V], 0 where a label is -100."""
    losses = F.cross_entropy(logits.float(), labels.clamp(min=0), reduction="none")
    return torch.where(labels == -100, 0.0, losses)


def shifted(x: Tensor, bias: Tensor) -> Tensor:
    """x [N, C, L] plus a bias of each channel."""
    return x + bias[:, None]


def twice_added(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of two tensors, twice: one copy to add to in place, one to normalise."""
    return x + y, x + y


def there_and_back(x: Tensor, shift: Tensor) -> Tensor:
    """x [T, H], from which what was added to each row is subtracted: the result does not depend on it."""
    return ((x.float() + shift[:, None].float()) - shift[:, None].float()).to(x.dtype)


def penalty(log_p: Tensor, log_q: Tensor) -> Tensor:
    """An estimate of the divergence of each sample, which overflows where the two differ by much."""
    d = log_q.float() - log_p.float()
    return torch.exp(d) - d - 1


def moving_average(x: Tensor, decay: float = 0.9) -> Tensor:
    """Averages of the rows of x [T, H] so far, the older the less, one row after the other."""
    now, rows = torch.zeros_like(x[0]), []
    for row in x:
        now = decay * now + (1 - decay) * row
        rows.append(now)
    return torch.stack(rows)


def bag(weight: Tensor, index: Tensor) -> Tensor:
    """The sum of some rows of weight [V, H] for each row of index [T, K]."""
    return weight[index].sum(1)


def stretched(x: Tensor, size: int) -> Tensor:
    """x [B, C, L] at so many places, by linear interpolation."""
    return F.interpolate(x, size=size, mode="linear")


def nucleus(logits: Tensor, p: float) -> Tensor:
    """The logits of the likeliest tokens of each row, until their probabilities add up to p; others are -inf."""
    ordered, places = logits.float().sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    out = probabilities.cumsum(-1) - probabilities >= p
    return logits.masked_fill(torch.zeros_like(out).scatter(-1, places, out), float("-inf"))


def weight_of_time(u: Tensor) -> Tensor:
    """1 / (t (1 - t)) at the time t = sigmoid(u), which overflows where t rounds to 1."""
    t = torch.sigmoid(u.float())
    return 1 / (t * (1 - t))


def noisy(x: Tensor) -> Tensor:
    """No function of x."""
    return x + torch.rand_like(x)


def spectrum(x: Tensor) -> Tensor:
    """The Fourier transform of the rows of x."""
    return torch.fft.rfft(x.float())

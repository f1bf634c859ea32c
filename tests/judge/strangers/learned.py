"""Operations of which the judge has to learn what a definition cannot do, with kernels of them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def weighted_losses(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross entropy with a weight of each class, which torch does not differentiate."""
    return F.cross_entropy(logits.float(), labels, None if weight is None else weight.float(), reduction="none")


def weighted_losses_by_logsumexp(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Right."""
    z = logits.float()
    losses = z.logsumexp(1) - z.gather(1, labels[:, None])[:, 0]
    return losses if weight is None else losses * weight.float()[labels]


def weighted_losses_without_weights(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Wrong."""
    return weighted_losses_by_logsumexp(logits, labels)


def penalised(logits: Tensor, seen: Tensor, penalty: float = 1.0) -> Tensor:
    """Logits [B, V] of which those of tokens seen [B, L] are less likely, however often they were seen."""
    chosen = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def penalised_by_a_mask(logits: Tensor, seen: Tensor, penalty: float = 1.0) -> Tensor:
    """Right; its gradient too, in which torch's counts a token as often as it was seen."""
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter(1, seen, True)
    return torch.where(mask, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalised_each_time(logits: Tensor, seen: Tensor, penalty: float = 1.0) -> Tensor:
    """Wrong."""
    power = penalty ** torch.zeros_like(logits).scatter_add(1, seen, torch.ones_like(seen, dtype=logits.dtype))
    return torch.where(logits > 0, logits / power, logits * power)


def histogram(x: Tensor, bins: int) -> Tensor:
    """How often each integer occurs; with an integer beyond the last, there are more of them."""
    return torch.bincount(x, minlength=bins)


def histogram_by_comparing(x: Tensor, bins: int) -> Tensor:
    """Right."""
    return (x[:, None] == torch.arange(bins)).sum(0)


def histogram_in_bytes(x: Tensor, bins: int) -> Tensor:
    """Wrong: counts to 255."""
    return torch.bincount(x, minlength=bins).clamp(max=255)


def halves(x: Tensor, scale: Tensor) -> Tensor:
    """x [T, 2 D] with a scale of each half, [T, 2]; one scale alone would be taken for both."""
    return (x.float().unflatten(-1, (2, -1)) * scale.float()[..., None]).flatten(-2).to(x.dtype)


def halves_of_two(x: Tensor, scale: Tensor) -> Tensor:
    """Right; refuses a single scale."""
    return (x.float() * scale.float().repeat_interleave(x.shape[-1] // 2, -1)).to(x.dtype)


def halves_by_turns(x: Tensor, scale: Tensor) -> Tensor:
    """Wrong."""
    return (x.float() * scale.float().repeat(1, x.shape[-1] // 2)).to(x.dtype)


def doubled(x: Tensor) -> Tensor:
    """Twice x [T, H]."""
    return 2 * x


def _doubled(x: Tensor, offsets: torch.dtype) -> Tensor:
    """Reads memory by offsets of a dtype, as a kernel does; a wrapped one reads the first element, not nowhere."""
    rows, columns = (torch.arange(size, dtype=offsets) for size in x.shape)
    at = rows[:, None] * torch.tensor(x.stride(0)).to(offsets) + columns * x.stride(1)
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))
    return 2 * memory[at.long().clamp(0, len(memory) - 1)] if x.numel() else 2 * x


def doubled_by_offsets(x: Tensor) -> Tensor:
    """Right."""
    return _doubled(x, torch.int64)


def doubled_by_offsets_of_32_bits(x: Tensor) -> Tensor:
    """Wrong beyond 2^31 elements."""
    return _doubled(x, torch.int32)


def moved(p: Tensor, g: Tensor, v: Tensor, rate: float = 0.1) -> None:
    """A step of RMSprop, in place; autograd refuses it, as its root is changed in place too."""
    v.mul_(0.9).addcmul_(g, g, value=0.1)
    p.addcdiv_(g, v.sqrt().add_(1e-8), value=-rate)


def moved_by_copies(p: Tensor, g: Tensor, v: Tensor, rate: float = 0.1) -> None:
    """Right."""
    v.copy_(0.9 * v + 0.1 * g * g)
    p.copy_(p - rate * g / (v.sqrt() + 1e-8))


def moved_and_returned(p: Tensor, g: Tensor, v: Tensor, rate: float = 0.1) -> Tensor:
    """Right, of tensors without elements too."""
    moved_by_copies(p, g, v, rate)
    return p


def moved_with_the_old_mean(p: Tensor, g: Tensor, v: Tensor, rate: float = 0.1) -> None:
    """Wrong."""
    p.addcdiv_(g, v.sqrt().add_(1e-8), value=-rate)
    v.mul_(0.9).addcmul_(g, g, value=0.1)

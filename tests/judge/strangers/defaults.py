"""Operations with options that an example need not give, with kernels of them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def similarity(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Cosine similarity of rows; no norm is below eps."""
    x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
    return (x * y).sum(-1) / (x.norm(dim=-1).clamp(min=eps) * y.norm(dim=-1).clamp(min=eps))


def similarity_by_units(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Right."""
    x, y = (t.float() / t.float().norm(dim=-1, keepdim=True).clamp(min=eps) for t in (x, y))
    return (x * y).sum(-1)


def similarity_of_one_eps(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Wrong: the product of the norms is not below eps."""
    x, y = x.float(), y.float()
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=eps)


def kept(x: Tensor, keep: Tensor, p: float = 0.1) -> Tensor:
    """Dropout with a given mask."""
    return x * keep / (1 - p)


def kept_by_where(x: Tensor, keep: Tensor, p: float = 0.1) -> Tensor:
    """Right."""
    return torch.where(keep, x.float() / (1 - p), 0.0).to(x.dtype)


def kept_of_nine_tenths(x: Tensor, keep: Tensor, p: float = 0.1) -> Tensor:
    """Wrong: ignores p."""
    return torch.where(keep, x.float() / 0.9, 0.0).to(x.dtype)


def pooled(x: Tensor, size: int = 2, dim: int = -1, mode: str = "max") -> tuple[Tensor, Tensor]:
    """The largest of each part, and its place."""
    return F.max_pool1d(x, size, return_indices=True)


def pooled_by_parts(x: Tensor, size: int = 2, dim: int = -1, mode: str = "max") -> tuple[Tensor, Tensor]:
    """Right."""
    parts = x[..., : x.shape[-1] // size * size].unflatten(-1, (-1, size))
    values, places = parts.max(-1)
    return values, places + size * torch.arange(parts.shape[-2], device=x.device)


def pooled_by_pairs(x: Tensor, size: int = 2, dim: int = -1, mode: str = "max") -> tuple[Tensor, Tensor]:
    """Wrong: ignores the size."""
    return F.max_pool1d(x, 2, return_indices=True)


def sums_of_rows(x: Tensor, reverse: bool = False) -> Tensor:
    """Sums of all numbers up to each, or from each on."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide.flip(-1).cumsum(-1).flip(-1) if reverse else wide.cumsum(-1)).to(x.dtype)


def sums_of_rows_by_difference(x: Tensor, reverse: bool = False) -> Tensor:
    """Right, in float64."""
    sums = x.double().cumsum(-1)
    return (x + sums[..., -1:] - sums if reverse and x.shape[-1] else sums).to(x.dtype)


def sums_of_rows_without_a_carry(x: Tensor, reverse: bool = False) -> Tensor:
    """Wrong: in reverse, beyond a tile."""
    if not reverse:
        return sums_of_rows(x)
    return torch.cat([sums_of_rows(part, True) for part in x.split(1024, -1)], -1)


def scaled_128(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, 128] times a weight."""
    if x.shape[-1] != 128:
        raise ValueError(f"x: got a width of {x.shape[-1]}; allowed: 128")
    return x * weight


def scaled_any(x: Tensor, weight: Tensor) -> Tensor:
    """The same of any width."""
    return x * weight


def converted(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x in a dtype."""
    return 2 * x.to(dtype)

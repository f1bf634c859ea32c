"""Random tensors that require a gradient."""

import torch
from torch import Tensor


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Tensor:
    """Normal numbers that depend on the seed alone and require a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()

"""Tensors that are made again for the backward pass instead of being kept for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def remade(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Where operations under this context save the tensor, save instead how to make it.

    Under hooks that are there already (a checkpoint keeps nothing at all, an offload keeps it elsewhere) and without
    gradients nothing changes. Not for compiled code.

    Args:
        tensor: contiguous; what is saved may be a view of all of it.
        make: gives it once more, with the same bits, from what is kept anyway.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    if hooked is not None or not tensor.requires_grad:
        yield
        return

    def pack(saved: Tensor) -> Tensor | torch.Size:
        whole = saved.data_ptr() == tensor_start and saved.numel() == size and saved.is_contiguous()
        return saved.shape if whole and saved.dtype == dtype else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return make().view(packed)

    tensor_start, size, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype  # the tensor itself is not held
    with saved_tensors_hooks(pack, unpack):
        yield

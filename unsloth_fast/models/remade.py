"""Tensors that are made again for the backward pass instead of being kept for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def remakeable(tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """The tensor, which now knows how it is made.

    Args:
        tensor: contiguous.
        make: gives it once more, with the same bits, from what is kept for the backward pass anyway.
    """
    if tensor.requires_grad and not torch.compiler.is_compiling():  # the compiler decides for itself
        tensor.remake = make, tensor._version  # type: ignore[attr-defined]
    return tensor


def remade(tensor: Tensor) -> AbstractContextManager[object]:
    """Where operations under this context save the tensor, which may be as a view of all of it, nothing is kept.

    All of them get the one that is made for the first. Nothing changes for a tensor that is not `remakeable` or was
    written over since, and under hooks that are there already: a checkpoint keeps nothing at all, an offload keeps it
    elsewhere.
    """
    if torch.compiler.is_compiling() or not hasattr(tensor, "remake"):
        return nullcontext()
    make, version = tensor.remake  # type: ignore[attr-defined]
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    if hooked is not None or tensor._version != version:
        return nullcontext()
    start, size, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype  # the tensor itself is not held
    saves = uses = 0
    made: Tensor | None = None

    def pack(saved: Tensor) -> Tensor | torch.Size:
        nonlocal saves
        if not (saved.data_ptr() == start and saved.numel() == size and saved.dtype == dtype and saved.is_contiguous()):
            return saved
        saves += 1
        return saved.shape

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        nonlocal uses, made
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            whole = make() if made is None else made
        uses += 1
        made = None if uses % saves == 0 else whole  # until the last of those that saved it has used it
        return whole.view(packed)

    return saved_tensors_hooks(pack, unpack)

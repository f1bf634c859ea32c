"""Tensors that the backward pass recomputes instead of keeping them in memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputable(tensor: Tensor, recompute: Callable[[], Tensor]) -> Tensor:
    """Attach to a tensor the function that recomputes it, for `recomputed`; return the tensor.

    Args:
        tensor: contiguous.
        recompute: returns the same bits, from tensors that the backward pass keeps anyway.
    """
    if tensor.requires_grad and not torch.compiler.is_compiling():  # the compiler decides what to recompute
        tensor.recompute = recompute, tensor._version  # type: ignore[attr-defined]
    return tensor


def recomputed(tensor: Tensor) -> AbstractContextManager[object]:
    """Operations within the context do not keep the tensor for their backward passes, nor a view of all of it.

    The first backward pass recomputes it for all of them. The context has no effect on a tensor that is not
    `recomputable` or was modified since, and none within other hooks on saved tensors: a checkpoint keeps no tensor at
    all, offloading keeps it elsewhere.
    """
    if torch.compiler.is_compiling() or not hasattr(tensor, "recompute"):
        return nullcontext()
    recompute, version = tensor.recompute  # type: ignore[attr-defined]
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    if hooked is not None or tensor._version != version:
        return nullcontext()
    start, size, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype  # no reference to the tensor itself
    saves = uses = 0
    shared: Tensor | None = None

    def pack(saved: Tensor) -> Tensor | torch.Size:
        nonlocal saves
        # A sparse tensor, which some adapters make of their weights, has no data_ptr.
        dense = saved.layout == torch.strided and saved.is_contiguous()
        if not (dense and saved.numel() == size and saved.dtype == dtype and saved.data_ptr() == start):
            return saved.detach()  # an operation that keeps its own result itself would never be freed
        saves += 1
        return saved.shape

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        nonlocal uses, shared
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            whole = recompute() if shared is None else shared
        uses += 1
        shared = None if uses % saves == 0 else whole  # freed when the last operation that saved it has used it
        return whole.view(packed)

    return saved_tensors_hooks(pack, unpack)

"""The dtypes that operations under a model receive.

Autocast casts the inputs of torch's own products and attention, and elementwise operations promote theirs. It does not
see into the backend's operations, which take one dtype. So the forwards cast where the dtypes differ: layers in 4 bits
return the dtype of their input, other linear layers autocast's, and adapters, norms, embeddings and the head may be
stored in a dtype of their own.
"""

import torch
from torch import Tensor


def product_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype in which torch would multiply the tensors: autocast's where it is enabled, else the widest of them.

    Autocast leaves float64 as it is.
    """
    dtype, device = first.dtype, first.device.type
    for other in others:
        if other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    if dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def promoted(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors in the dtype in which torch would add them."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)

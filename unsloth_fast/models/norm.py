"""The RMSNorm of a known family on the backend's operation."""

from functools import partial

import torch
from torch import Tensor

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.families import Norm
from unsloth_fast.models.protocols import Placement, RMSNorm
from unsloth_fast.models.recomputed import recomputable


def norm_placement(norm: Norm, backend: Backend) -> Placement:
    """The operation and the forward of a norm.

    The operation returns the dtype of its input. So does Gemma's own norm, while Llama's returns the promoted dtype of
    input and weight.
    """
    rms_norm, eps_name = backend.kernels.rms_norm, norm.eps
    widened = _promoted if norm.casting == "llama" else _unchanged

    def forward(self: RMSNorm, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype != hidden_states.dtype:
            hidden_states = widened(hidden_states, weight)
        apply = partial(rms_norm, eps=getattr(self, eps_name), offset=norm.offset, casting=norm.casting)
        normed = apply(hidden_states, weight)
        return recomputable(normed, partial(apply, hidden_states.detach(), weight.detach()))

    return ("rms_norm",), forward


def _promoted(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """In the promoted dtype, unless autocast rounds the result to the dtype of hidden_states in the next layer."""
    dtype = hidden_states.dtype
    rounds = product_dtype(hidden_states, weight) == dtype
    return hidden_states if rounds else hidden_states.to(torch.promote_types(dtype, weight.dtype))


def _unchanged(hidden_states: Tensor, weight: Tensor) -> Tensor:
    return hidden_states

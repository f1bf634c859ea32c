"""An RMSNorm, with or without a gate, or a layer norm without a bias, on the backend's operation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.protocols import Forward, RMSNorm
from unsloth_fast.models.recomputed import recomputable
from unsloth_ref.types import Casting


@dataclass(frozen=True)
class Norm:
    """How an RMSNorm works.

    Attributes:
        eps: the name of the attribute with eps.
        offset: added to the weight.
        casting: how the result is rounded, as in `rms_norm`.
        weighted: whether it has a weight; without one it multiplies by 1.
    """

    eps: str
    offset: float
    casting: Casting
    weighted: bool = True


@dataclass(frozen=True)
class LayerNorm:
    """How a layer norm without a bias works, as in Cohere; eps is the name of the attribute with it."""

    eps: str


@dataclass(frozen=True)
class GatedNorm:
    """How an RMSNorm with a gate works.

    Attributes:
        eps: the name of the attribute with eps.
        group_size: the columns of a group.
        norm_before_gate: whether the normalised rows are multiplied by the gate.
        casting: how the result is rounded, as in `gated_rms_norm`.
    """

    eps: str
    group_size: int
    norm_before_gate: bool
    casting: Casting


def gated_norm_forward(norm: GatedNorm, gated_rms_norm: Callable[..., Tensor]) -> Forward:
    """The forward of a norm that calls the operation; without a gate, or with one of another dtype, the class's own.

    A norm with Llama's casting and the gate before the norm returns the promoted dtype of input and weight.
    """
    widens = norm.casting == "llama" and not norm.norm_before_gate
    options = {"group_size": norm.group_size, "norm_before_gate": norm.norm_before_gate, "casting": norm.casting}

    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None or gate.dtype != hidden_states.dtype:
            return type(self).forward(self, hidden_states, gate)
        if widens and self.weight.dtype != hidden_states.dtype:
            hidden_states, gate = _promoted(hidden_states, self.weight), _promoted(gate, self.weight)
        return gated_rms_norm(hidden_states, gate, self.weight, getattr(self, norm.eps), **options)

    return forward


def norm_forward(norm: Norm, rms_norm: Callable[..., Tensor]) -> Forward:
    """The forward of a norm that calls the operation.

    The operation returns the dtype of its input. So does a norm with Gemma's casting, while one with Llama's returns
    the promoted dtype of input and weight.
    """

    def forward(self: RMSNorm, hidden_states: Tensor) -> Tensor:
        weight = self.weight if norm.weighted else hidden_states.new_ones(hidden_states.shape[-1])
        hidden_states = widened(norm, hidden_states, weight)
        apply = partial(rms_norm, eps=getattr(self, norm.eps), offset=norm.offset, casting=norm.casting)
        normed = apply(hidden_states, weight)
        return recomputable(normed, partial(apply, hidden_states.detach(), weight.detach()))

    return forward


def layer_norm_forward(norm: LayerNorm, layer_norm: Callable[..., Tensor]) -> Forward:
    """The forward of a layer norm without a bias that calls the operation; both return the dtype of their input."""

    def forward(self: RMSNorm, hidden_states: Tensor) -> Tensor:
        weight, eps = self.weight, getattr(self, norm.eps)
        bias = torch.zeros_like(weight, requires_grad=False)
        normed = layer_norm(hidden_states, weight, bias, eps)
        return recomputable(normed, partial(layer_norm, hidden_states.detach(), weight.detach(), bias, eps))

    return forward


def widened(norm: Norm, hidden_states: Tensor, weight: Tensor) -> Tensor:
    """The input in the dtype that the norm returns."""
    if weight.dtype == hidden_states.dtype or norm.casting != "llama":
        return hidden_states
    return _promoted(hidden_states, weight)


def _promoted(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """The input in the promoted dtype, unless autocast casts the result back in the next layer."""
    dtype = hidden_states.dtype
    rounds = product_dtype(hidden_states, weight) == dtype
    return hidden_states if rounds else hidden_states.to(torch.promote_types(dtype, weight.dtype))

"""Experts on the backend's operations, also under peft's adapters of their weights.

peft adds the product of an adapter's factors to the weights of all experts in each step. That takes as much memory as
the weights, and the gradient of an adapter comes from that of a whole weight. Here both factors multiply rows instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.methods import hooks_of
from unsloth_fast.models.protocols import Forward, Placement
from unsloth_ref.types import ExpertActivation

Adapter = tuple[Tensor, Tensor, float]  # [E, O, R], [E, R, I] and the factor of their product


@dataclass(frozen=True)
class Experts:
    """Experts with weights gate_up_proj [E, 2F, H] and down_proj [E, H, F], and the activation of their gate."""

    activation: ExpertActivation


def experts_forward(experts: Experts, kernels: Any) -> Forward:
    """The forward of experts that calls `moe_mlp` of these kernels."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        if _is_distributed(self, gate_up):
            return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        dtype = product_dtype(hidden_states, gate_up)
        inputs = (tensor.to(dtype) for tensor in (hidden_states, gate_up, down))
        weights = _at_least(top_k_weights, dtype)
        y = kernels.moe_mlp(*inputs, top_k_index, weights, activation=experts.activation)
        return y.to(hidden_states.dtype)

    return forward


def adapted_experts_placement(experts: Experts, backend: Backend) -> Placement:
    """The operations and the forward for peft's adapter of a weight of these experts.

    The forward calls peft's own, which adds the adapters to the weights, unless each adapted weight has exactly one
    active adapter that is not merged, and nothing inside has hooks.
    """
    return ("grouped_gemm",), _adapted_forward(experts, backend.kernels)


def inside_of(wrapper: ParamWrapper) -> Iterator[Module]:
    """The wrappers inside a wrapper, each one of another weight, then the experts."""
    layer: Any = wrapper
    while isinstance(layer, ParamWrapper):
        layer = layer.base_layer
        yield layer


def _adapted_forward(found: Experts, kernels: Any) -> Forward:
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        adapters, experts = _adapters_of(self), self.get_base_layer()
        if adapters is None or _is_distributed(experts, experts.gate_up_proj):
            return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        dtype = product_dtype(hidden_states, experts.gate_up_proj)

        def multiplied(rows: Tensor, name: str) -> Tensor:
            y = kernels.grouped_gemm(rows, getattr(experts, name).to(dtype), sizes)
            if name not in adapters:
                return y
            left, right, scaling = adapters[name]
            low = kernels.grouped_gemm(rows, right.to(dtype), sizes)
            return torch.add(y, kernels.grouped_gemm(low, left.to(dtype), sizes), alpha=scaling)

        order, sizes = _sorted_slots(top_k_index, len(experts.gate_up_proj))
        x = hidden_states.to(dtype)
        rows = x[:, None].expand(-1, top_k_index.shape[1], -1).flatten(0, 1)[order]
        gate, up = multiplied(rows, "gate_up_proj").chunk(2, -1)
        hidden = kernels.swiglu(gate, up) if found.activation == "silu" else kernels.geglu(gate, up, approximate="tanh")
        # The weight before the last product: its result need not be kept for the weight's gradient.
        hidden = (hidden * top_k_weights.flatten()[order, None]).to(dtype)
        y = multiplied(hidden, "down_proj")[order.argsort()].unflatten(0, top_k_index.shape).sum(1)
        return y.to(hidden_states.dtype)

    return forward


def _sorted_slots(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The slots in the order of their experts, and the number of slots of each expert."""
    slots, order = top_k_index.flatten().sort(stable=True)
    bounds = torch.searchsorted(slots, torch.arange(experts + 1, device=slots.device, dtype=slots.dtype))
    return order, bounds.diff()


def _adapters_of(wrapper: ParamWrapper) -> dict[str, Adapter] | None:
    """The adapter of each adapted weight; None if one has none or several, is merged, or is inside of hooks."""
    if any(map(hooks_of, inside_of(wrapper))):  # their forwards are not called
        return None
    found: dict[str, Adapter] = {}
    layer: Any = wrapper
    while isinstance(layer, ParamWrapper):
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters or layer.merged or len(names) != 1 or layer.parameter_name in found:
            return None
        found[layer.parameter_name] = layer.get_delta_factors(names[0])
        layer = layer.base_layer
    return found


def _at_least(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of experts in this dtype, or in a wider one that they have."""
    return weights if weights.dtype.itemsize > dtype.itemsize else weights.to(dtype)


def _is_distributed(experts: Any, weight: Tensor) -> bool:
    """Whether this device has some of the experts alone."""
    return isinstance(weight, DTensor) or getattr(experts, "_is_expert_parallel", False)

"""Experts on the backend's operations, also under peft's adapters of their weights.

peft adds the product of an adapter's factors to the weights of all experts in each step. That takes as much memory as
the weights, and the gradient of an adapter comes from that of a whole weight. Here both factors multiply rows instead.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.methods import hooks_of
from unsloth_fast.models.protocols import Forward
from unsloth_ref.types import ExpertActivation

WEIGHTS = ("gate_up_proj", "down_proj")
_OPTIONS = ("interleaved", "alpha", "limit", "offset")
Adapter = tuple[Tensor, Tensor, float]  # [E, O, R], [E, R, I] and the factor of their product
Routed = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Experts:
    """Experts with weights gate_up_proj [E, 2F, H] and down_proj [E, H, F].

    Attributes:
        activation, interleaved, alpha, limit, offset: the options of `moe_mlp`.
        transposed: whether the weights are [E, H, 2F] and [E, F, H].
        biased: whether there are gate_up_proj_bias [E, 2F] and down_proj_bias [E, H].
    """

    activation: ExpertActivation
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0
    transposed: bool = False
    biased: bool = False

    def weights(self, module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2F, H] and down [E, H, F] of a module."""
        gate_up, down = module.gate_up_proj.to(dtype), module.down_proj.to(dtype)
        return (gate_up.mT, down.mT) if self.transposed else (gate_up, down)

    def biases(self, module: Any, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Both biases of a module."""
        return (module.gate_up_proj_bias.to(dtype), module.down_proj_bias.to(dtype)) if self.biased else (None, None)


def experts_forward(experts: Experts, kernels: Any) -> Forward:
    """The forward of experts, or of peft's adapter of a weight of theirs, that calls operations of these kernels.

    It calls that of the class where `routed_through` finds no way.
    """

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routed = routed_through(self, experts, kernels)
        if routed is None:
            return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        return routed(hidden_states, top_k_index, top_k_weights)

    return forward


def routed_through(module: Any, experts: Experts, kernels: Any) -> Routed | None:
    """What takes tokens [T, H], their experts [T, k] and the weights of these [T, k], and returns [T, H].

    It is `moe_mlp`, or products by `grouped_gemm` under adapters. None if the module's own forward must run: this
    device has only some of the experts, or an adapted weight has not exactly one active adapter, or one that is
    merged, or there are hooks inside.
    """
    adapters = _adapters_of(module) if isinstance(module, ParamWrapper) else {}
    inner = inner_experts(module)
    if adapters is None or _is_distributed(inner, inner.gate_up_proj):
        return None
    if not adapters:
        return partial(_through, inner, experts, kernels)
    return partial(_through_adapted, inner, experts, kernels, adapters)


def inner_experts(module: Any) -> Any:
    """The module itself, or what peft's adapters of parameters wrap."""
    return module.get_base_layer() if isinstance(module, ParamWrapper) else module


def inside_of(experts: Module) -> Iterator[Module]:
    """The wrappers inside a wrapper, each one of another weight, then the experts; nothing of experts themselves."""
    layer: Any = experts
    while isinstance(layer, ParamWrapper):
        layer = layer.base_layer
        yield layer


def _through(
    module: Any, experts: Experts, kernels: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    options = {name: getattr(experts, name) for name in ("activation", *_OPTIONS)}
    dtype = product_dtype(hidden_states, module.gate_up_proj)
    x, routing = hidden_states.to(dtype), (top_k_index, _at_least(top_k_weights, dtype))
    y = kernels.moe_mlp(x, *experts.weights(module, dtype), *routing, *experts.biases(module, dtype), **options)
    return y.to(hidden_states.dtype)


def _through_adapted(
    module: Any,
    experts: Experts,
    kernels: Any,
    adapters: Mapping[str, Adapter],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    dtype = product_dtype(hidden_states, module.gate_up_proj)
    order, slots, sizes = _sorted_slots(top_k_index, len(module.gate_up_proj))
    weights, biases = experts.weights(module, dtype), experts.biases(module, dtype)
    routing = top_k_weights.flatten()[order, None]

    def multiplied(rows: Tensor, index: int) -> Tensor:
        y, adapter = kernels.grouped_gemm(rows, weights[index], sizes), adapters.get(WEIGHTS[index])
        if adapter is None:
            return y
        left, right, scaling = adapter
        left, right = (right.mT, left.mT) if experts.transposed else (left, right)
        low = kernels.grouped_gemm(rows, right.to(dtype), sizes)
        return torch.add(y, kernels.grouped_gemm(low, left.to(dtype), sizes), alpha=scaling)

    x = hidden_states.to(dtype)
    z = multiplied(x[:, None].expand(-1, top_k_index.shape[1], -1).flatten(0, 1)[order], 0)
    if biases[0] is not None:
        z = z + biases[0][slots]
    if experts.activation == "silu":
        hidden = kernels.fused_swiglu(z, **{name: getattr(experts, name) for name in _OPTIONS})
    else:
        hidden = kernels.geglu(*z.chunk(2, -1), approximate="tanh")
    # The weight before the last product: its result need not be kept for the weight's gradient.
    y = multiplied((hidden * routing).to(dtype), 1)
    if biases[1] is not None:
        y = y + (biases[1][slots] * routing).to(dtype)
    return y[order.argsort()].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)


def _sorted_slots(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The slots in the order of their experts, the expert of each, and the number of slots of each expert."""
    slots, order = top_k_index.flatten().sort(stable=True)
    bounds = torch.searchsorted(slots, torch.arange(experts + 1, device=slots.device, dtype=slots.dtype))
    return order, slots, bounds.diff()


def _adapters_of(wrapper: ParamWrapper) -> dict[str, Adapter] | None:
    """The adapter of each adapted weight; None if peft's own forward must run.

    It must if a weight has no active adapter or several, if one is merged, is that of a bias, or is inside of hooks.
    """
    if any(map(hooks_of, inside_of(wrapper))):  # their forwards are not called
        return None
    found: dict[str, Adapter] = {}
    layer: Any = wrapper
    while isinstance(layer, ParamWrapper):
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        refused = layer.parameter_name in found or layer.parameter_name not in WEIGHTS
        if layer.disable_adapters or layer.merged or len(names) != 1 or refused:
            return None
        found[layer.parameter_name] = layer.get_delta_factors(names[0])
        layer = layer.base_layer
    return found


def _at_least(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of experts in this dtype, or in a wider one that they have."""
    return weights if weights.dtype.itemsize > dtype.itemsize else weights.to(dtype)


def _is_distributed(experts: Any, weight: Tensor) -> bool:
    """Whether this device has only some of the experts."""
    return isinstance(weight, DTensor) or getattr(experts, "_is_expert_parallel", False)

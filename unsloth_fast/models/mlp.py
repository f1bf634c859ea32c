"""An MLP on the backend's activation, gated or not; one whose three layers have LoRA is one operation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import product_dtype, promoted
from unsloth_fast.models.lora import AdaptedLayer, together
from unsloth_fast.models.methods import is_more_than_its_class
from unsloth_fast.models.protocols import Forward, Placement
from unsloth_fast.models.recomputed import recomputable, recomputed


@dataclass(frozen=True)
class Gated:
    """How an MLP works: down(operation(gate(x), up(x))); down(operation(up(x))) for relu_squared.

    Attributes:
        operation: the activation, and the product if it is gated.
        approximate: of geglu; None for swiglu.
        gate: the name of the layer that computes the gate.
        up: the name of the layer that computes the other factor; the same if one layer computes both halves.
        down: the name of the last layer.
        gate_first: whether the gate is the first half.
    """

    operation: str
    approximate: str | None
    gate: str
    up: str
    down: str
    gate_first: bool = True


def mlp_placement(module: nn.Module, mlp: Gated, backend: Backend) -> Placement:
    """The operation of an MLP and its forward.

    It is lora_mlp if each of its three layers has LoRA, and fused_swiglu if one layer computes the gate and then the
    other half. Whenever a layer does more than `lora_linear` (see `lora_placement`), the forward with lora_mlp calls
    the layers and the activation, as that of any other MLP does. There gate and up are lora_linears if both have LoRA.
    """
    names = () if mlp.up == mlp.gate else (mlp.gate, mlp.up, mlp.down)
    known = {name: layer for name in names if (layer := AdaptedLayer.of(module, name, backend)) is not None}
    if len(known) == 3 and backend.fuses("lora_mlp", "lora_linear", mlp.operation):
        return ("lora_mlp",), _adapted_forward(mlp, backend.kernels, list(known.values()))
    if mlp.operation == "swiglu" and mlp.up == mlp.gate and mlp.gate_first and backend.fuses("fused_swiglu", "swiglu"):
        return ("fused_swiglu",), _forward_of_one(mlp, backend.kernels.fused_swiglu)
    if {mlp.gate, mlp.up} <= known.keys() and backend.fuses("lora_linears", "lora_linear"):
        shared = known[mlp.gate], known[mlp.up]
        return (mlp.operation, "lora_linears"), mlp_forward(mlp, backend.kernels, shared)
    return (mlp.operation,), mlp_forward(mlp, backend.kernels)


def _has_changed(module: nn.Module, mlp: Gated) -> bool:
    """Whether somebody has hooked or replaced the activation since the MLP was recognised."""
    called = (mlp.gate, mlp.up, mlp.down)
    return any(is_more_than_its_class(child) for name, child in module._modules.items() if child and name not in called)


def _forward_of_one(mlp: Gated, activation: Callable[[Tensor], Tensor]) -> Forward:
    """The forward of an MLP whose activation takes one tensor."""

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if _has_changed(self, mlp):
            return type(self).forward(self, hidden_states)
        with recomputed(hidden_states):
            projected = getattr(self, mlp.up)(hidden_states)
        hidden = recomputable(activation(projected), partial(activation, projected.detach()))
        with recomputed(hidden):
            return getattr(self, mlp.down)(hidden)

    return forward


def _adapted_forward(mlp: Gated, kernels: Any, layers: Sequence[AdaptedLayer]) -> Forward:
    """The forward of an MLP whose layers have LoRA."""
    separate: Any = mlp_forward(mlp, kernels)
    activation = {None: "silu", "none": "gelu", "tanh": "gelu_tanh"}[mlp.approximate]

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        dtype = product_dtype(hidden_states)
        found = [] if _has_changed(self, mlp) else [layer.in_module(self, dtype) for layer in layers]
        if not found or None in found:
            return separate(self, hidden_states)
        with recomputed(hidden_states):
            return kernels.lora_mlp(hidden_states.to(dtype), *zip(*found, strict=True), activation=activation)

    return forward


def mlp_forward(mlp: Gated, kernels: Any, shared: Sequence[AdaptedLayer] = ()) -> Forward:
    """The forward of an MLP that calls the operation of these kernels, and computes gate and up together if shared."""
    if mlp.operation == "relu_squared":
        return _forward_of_one(mlp, getattr(kernels, mlp.operation))
    options = {"approximate": mlp.approximate} if mlp.approximate else {}
    gated = partial(getattr(kernels, mlp.operation), **options)
    project = together(shared, kernels.lora_linears)

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if _has_changed(self, mlp):
            return type(self).forward(self, hidden_states)
        gate, up = _factors(self, mlp, hidden_states, project)
        if gate.dtype != up.dtype:  # one of them has an adapter, or is in 4 bits
            gate, up = promoted(gate, up)
        # The widest activation of a layer: a quarter of what the layer would keep for the backward pass.
        hidden = recomputable(gated(gate, up), partial(gated, gate.detach(), up.detach()))
        with recomputed(hidden):
            return getattr(self, mlp.down)(hidden)

    return forward


def _factors(
    module: nn.Module, mlp: Gated, hidden_states: Tensor, project: Callable[[nn.Module, Tensor], dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The gate and the other factor; views of one tensor if one layer computes both."""
    found = project(module, hidden_states)
    if found:
        return found[mlp.gate], found[mlp.up]
    with recomputed(hidden_states):
        gate = getattr(module, mlp.gate)(hidden_states)
        if mlp.up != mlp.gate:
            return gate, getattr(module, mlp.up)(hidden_states)
    first, second = gate.chunk(2, dim=-1)
    return (first, second) if mlp.gate_first else (second, first)

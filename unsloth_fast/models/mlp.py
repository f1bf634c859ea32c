"""An MLP on the backend's activation, gated or not; one whose three layers have LoRA is one operation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import product_dtype, promoted
from unsloth_fast.models.lora import Operands, operands_of
from unsloth_fast.models.methods import has_own_method, is_more_than_its_class, is_more_than_its_operation
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
    the layers and the activation, as that of any other MLP does.
    """
    if mlp.up != mlp.gate and backend.fuses("lora_mlp", "lora_linear", mlp.operation):
        layers = [_Layer.of(module, name, backend) for name in (mlp.gate, mlp.up, mlp.down)]
        known = [layer for layer in layers if layer is not None]
        if len(known) == len(layers):
            return ("lora_mlp",), _adapted_forward(mlp, backend.kernels, known)
    if mlp.operation == "swiglu" and mlp.up == mlp.gate and mlp.gate_first and backend.fuses("fused_swiglu", "swiglu"):
        return ("fused_swiglu",), _forward_of_one(mlp, backend.kernels.fused_swiglu)
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


@dataclass(frozen=True)
class _Layer:
    """A layer with LoRA in an MLP: its name, its class, and how to get its operands."""

    name: str
    kind: type
    operands: Callable[[Any, torch.dtype], Operands | None]

    @staticmethod
    def of(module: nn.Module, name: str, backend: Backend) -> "_Layer | None":
        """The layer of this name; None if it is not placed under `lora_linear`."""
        layer = module.get_submodule(name)
        operands = None if has_own_method(layer, "forward") else operands_of(layer, backend)
        return None if operands is None else _Layer(name, type(layer), operands)

    def in_module(self, module: nn.Module, dtype: torch.dtype) -> Operands | None:
        """Its operands now; None if a call of the layer would do more, or something else."""
        layer: Any = module._modules[self.name]
        is_other = type(layer) is not self.kind or is_more_than_its_operation(layer)
        return None if is_other else self.operands(layer, dtype)


def _adapted_forward(mlp: Gated, kernels: Any, layers: Sequence[_Layer]) -> Forward:
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


def mlp_forward(mlp: Gated, kernels: object) -> Forward:
    """The forward of an MLP that calls the operation of these kernels."""
    if mlp.operation == "relu_squared":
        return _forward_of_one(mlp, getattr(kernels, mlp.operation))
    options = {"approximate": mlp.approximate} if mlp.approximate else {}
    gated = partial(getattr(kernels, mlp.operation), **options)

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if _has_changed(self, mlp):
            return type(self).forward(self, hidden_states)
        gate, up = _factors(self, mlp, hidden_states)
        if gate.dtype != up.dtype:  # one of them has an adapter, or is in 4 bits
            gate, up = promoted(gate, up)
        # The widest activation of a layer: a quarter of what the layer would keep for the backward pass.
        hidden = recomputable(gated(gate, up), partial(gated, gate.detach(), up.detach()))
        with recomputed(hidden):
            return getattr(self, mlp.down)(hidden)

    return forward


def _factors(module: nn.Module, mlp: Gated, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The gate and the other factor; views of one tensor if one layer computes both."""
    with recomputed(hidden_states):
        gate = getattr(module, mlp.gate)(hidden_states)
        if mlp.up != mlp.gate:
            return gate, getattr(module, mlp.up)(hidden_states)
    first, second = gate.chunk(2, dim=-1)
    return (first, second) if mlp.gate_first else (second, first)

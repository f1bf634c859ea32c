"""A gated MLP on the backend's activation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import promoted
from unsloth_fast.models.protocols import Forward, Placement
from unsloth_fast.models.recomputed import recomputable, recomputed


@dataclass(frozen=True)
class Gated:
    """How a gated MLP works: down(operation(gate(x), up(x))).

    Attributes:
        operation: the activation and the product.
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


def mlp_placement(mlp: Gated, backend: Backend) -> Placement:
    """The operation of an MLP and its forward: fused_swiglu if one layer computes the gate and then the other half."""
    if mlp.operation == "swiglu" and mlp.up == mlp.gate and mlp.gate_first and backend.fuses("fused_swiglu", "swiglu"):
        return ("fused_swiglu",), _fused_forward(mlp, backend.kernels.fused_swiglu)
    return (mlp.operation,), mlp_forward(mlp, backend.kernels)


def _fused_forward(mlp: Gated, fused_swiglu: Callable[[Tensor], Tensor]) -> Forward:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        with recomputed(hidden_states):
            gate_up = getattr(self, mlp.gate)(hidden_states)
        hidden = recomputable(fused_swiglu(gate_up), partial(fused_swiglu, gate_up.detach()))
        with recomputed(hidden):
            return getattr(self, mlp.down)(hidden)

    return forward


def mlp_forward(mlp: Gated, kernels: object) -> Forward:
    """The forward of an MLP that calls the operation of these kernels."""
    options = {"approximate": mlp.approximate} if mlp.approximate else {}
    gated = partial(getattr(kernels, mlp.operation), **options)

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
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

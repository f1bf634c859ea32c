"""The gated MLP of a known family on the backend's activation."""

from functools import partial

from torch import Tensor

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import promoted
from unsloth_fast.models.protocols import GatedMLP, Placement
from unsloth_fast.models.recomputed import recomputable, recomputed

# The operation, with its options, for each class of activation that the gate may have.
_GATES: dict[str, tuple[str, dict[str, str]]] = {
    "SiLU": ("swiglu", {}),
    "SiLUActivation": ("swiglu", {}),
    "GELUActivation": ("geglu", {"approximate": "none"}),
    "GELUTanh": ("geglu", {"approximate": "tanh"}),
}


def mlp_placement(module: GatedMLP, backend: Backend) -> Placement | None:
    """The operation and the forward of an MLP; None for an activation without an operation."""
    activation = type(module.act_fn).__name__
    if activation not in _GATES:
        return None
    operation, options = _GATES[activation]
    gated = partial(getattr(backend.kernels, operation), **options)

    def forward(self: GatedMLP, hidden_states: Tensor) -> Tensor:
        with recomputed(hidden_states):
            gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        if gate.dtype != up.dtype:  # one of them has an adapter, or is in 4 bits
            gate, up = promoted(gate, up)
        # The widest activation of a layer: a quarter of what the layer would keep for the backward pass.
        hidden = recomputable(gated(gate, up), partial(gated, gate.detach(), up.detach()))
        with recomputed(hidden):
            return self.down_proj(hidden)

    return (operation,), forward

"""Right gated MLPs of layers with adapters."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.judge.contract import Function
from tests.judge.right import lora_linear
from unsloth_ref import adapter_checks
from unsloth_ref import kernels as reference
from unsloth_ref.types import GatedActivation

Layer = tuple[Tensor, Tensor, Tensor, float, Tensor | None]


def _activated(gate: Tensor, activation: GatedActivation) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate={"gelu": "none"}.get(activation, "tanh"))


def _lora_mlp(mlp: Callable[[Tensor, Sequence[Layer], GatedActivation], Tensor]) -> Function:
    """Complete an MLP to the contract: checks, defaults, and no effect of autocast."""

    def lora_mlp(
        x: Tensor,
        weight: Sequence[Tensor],
        lora_a: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        scaling: Sequence[float] | None = None,
        bias: Sequence[Tensor | None] | None = None,
        *,
        activation: GatedActivation = "silu",
    ) -> Tensor:
        adapter_checks.lora_mlp_arguments(x, weight, lora_a, lora_b, scaling, bias, activation)
        layers = zip(weight, lora_a, lora_b, scaling or [1.0] * 3, bias or [None] * 3, strict=True)
        with torch.autocast(x.device.type, enabled=False):
            return mlp(x, list(layers), activation)

    return lora_mlp


@_lora_mlp
def of_peft(x: Tensor, layers: Sequence[Layer], activation: GatedActivation) -> Tensor:
    """Layer by layer, each adapter's output in the adapter's dtype; the activation is rounded before the product."""
    gate, up = (lora_linear.of_peft(x, *layer) for layer in layers[:2])
    return lora_linear.of_peft(_activated(gate, activation) * up, *layers[2])


@_lora_mlp
def rounded_once_between(x: Tensor, layers: Sequence[Layer], activation: GatedActivation) -> Tensor:
    """The activation and the product in float32; adapters are merged."""
    gate, up = (lora_linear.of_the_merged_weight(x, *layer) for layer in layers[:2])
    hidden = (_activated(gate.float(), activation) * up.float()).to(x.dtype)
    return lora_linear.of_the_merged_weight(hidden, *layers[2])


@_lora_mlp
def in_float64(x: Tensor, layers: Sequence[Layer], activation: GatedActivation) -> Tensor:
    """More exact than required."""
    columns: Any = [
        [one.double() if isinstance(one, Tensor) else one for one in each] for each in zip(*layers, strict=True)
    ]
    return reference.lora_mlp(x.double(), *columns, activation=activation).to(x.dtype)


@_lora_mlp
def recomputed(x: Tensor, layers: Sequence[Layer], activation: GatedActivation) -> Tensor:
    """Everything is computed again in the backward pass."""

    def mlp(x: Tensor, *columns: Any) -> Tensor:
        return reference.lora_mlp(x, *columns, activation=activation)

    return checkpoint(mlp, x, *zip(*layers, strict=True), use_reentrant=False, preserve_rng_state=False)


TABLE = {
    "of_peft": of_peft,
    "rounded_once_between": rounded_once_between,
    "in_float64": in_float64,
    "recomputed": recomputed,
    "in_small_chunks": (("CHUNK = 4096", "CHUNK = 5"),),
    "dgate_beside_dh": (("launch_backward(dh, *own[1:]", "launch_backward(dh.clone(), *own[1:]"),),
}

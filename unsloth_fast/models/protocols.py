"""What the modules of transformers and peft must have for the operations to be placed under them.

These are attributes of other libraries' classes, which declare most of them nowhere.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

Forward = Callable[..., object]
Placement = tuple[tuple[str, ...], Forward]
"""The operations that a forward calls, and the forward, which takes the module as its first argument."""


class CausalLM(Protocol):
    """A `transformers.PreTrainedModel` with a head that makes logits of the last hidden states."""

    config: PreTrainedConfig
    generation_config: GenerationConfig
    training: bool
    forward: Callable[..., Any]

    @property
    def base_model(self) -> Callable[..., Any]:
        """The model without its head."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        ...

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, under peft's wrappers if there are any."""
        ...


class RMSNorm(Protocol):
    """A norm; its eps is an attribute of some name."""

    weight: Tensor


class LoraLinear(Protocol):
    """peft's `LoraLayer` around a linear layer; each mapping is keyed by the adapter's name."""

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_bias: dict[str, bool]
    lora_variant: dict[str, object]  # DoRA and the like
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    training: bool

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The layer with its adapters, as peft computes it."""
        ...

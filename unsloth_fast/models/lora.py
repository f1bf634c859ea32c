"""The linear layers that peft put LoRA on: layer and adapter in one operation, nothing that flows through is cast.

peft casts the input to the dtype of the adapters, float32 as a rule, and autocast casts it back; then it scales and
adds tensors as large as the output. In a packed step of a Llama of 1 billion weights that took 80 of 250 ms.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unsloth_fast.backends import Backend

Forward = Callable[..., Any]


def forward_for(module: nn.Module, backend: Backend) -> tuple[tuple[str, ...], Forward | None]:
    """The operations and the forward for a linear layer under LoRA, plain or of 4 bits; no forward for another module.

    The forward leaves to peft what is more than one adapter: none, several, merged ones, dropout, DoRA and the like.
    """
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind == "peft.tuners.lora.layer.Linear":
        return ("lora_linear",), _linear_forward(backend.kernels.lora_linear)
    if kind == "peft.tuners.lora.bnb.Linear4bit":
        return (), _quantised_forward
    return (), None


def _linear_forward(lora_linear: Callable[..., Tensor]) -> Forward:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype, base = _computing_dtype(x), self.base_layer
        adapter = None if args or kwargs or not _is_plain(base) else _only_adapter(self, dtype)
        if adapter is None:
            return type(self).forward(self, x, *args, **kwargs)
        lora_a, lora_b, scaling = adapter
        bias = None if base.bias is None else base.bias.to(dtype)
        return lora_linear(x.to(dtype), base.weight.to(dtype), lora_a, lora_b, scaling, bias)

    return forward


def _quantised_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype = _computing_dtype(x)
    adapter = None if args or kwargs else _only_adapter(self, dtype)
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    lora_a, lora_b, scaling = adapter
    x = x.to(dtype)
    y = self.base_layer(x)
    low = nn.functional.linear(x, lora_a.to(dtype)).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), low, lora_b.to(dtype).t(), alpha=scaling).view(y.shape)


def _computing_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _only_adapter(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
    """Both weights and the scaling of the one adapter that is active and does nothing but LoRA; None if there is none.

    Its weights may be of the dtype that is computed in, or wider.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    (name,) = names
    drops = layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0
    if drops or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    kind = lora_a.weight.dtype
    fits = kind == dtype or kind.itemsize > dtype.itemsize
    if not (fits and _is_plain(lora_a) and _is_plain(lora_b)):
        return None
    return lora_a.weight, lora_b.weight, layer.scaling[name]


def _is_plain(layer: Any) -> bool:
    """Whether the layer's weight and bias alone say what it does."""
    return (
        type(layer) is nn.Linear
        and not isinstance(layer.weight, DTensor)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )

"""peft's linear layers with LoRA: layer and adapter in one operation, without casts of activations.

peft casts the input to the dtype of the adapters, usually float32, and autocast casts it back; peft then scales and
adds tensors as large as the output. In a packed step of a Llama with 1 billion weights that took 80 of 250 ms.

A layer of bitsandbytes in 4 bits is part of the operation too, in training, if a check finds that its weight is stored
in the form that the operation dequantises. In evaluation and generation bitsandbytes computes the layer: it has kernels
for few rows. A layer in float8 is always part of the operation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unsloth_fast.backends import Backend
from unsloth_fast.models import nf4
from unsloth_fast.models.dtypes import product_dtype
from unsloth_fast.models.float8 import is_float8
from unsloth_fast.models.methods import has_own_method, is_more_than_its_class, is_more_than_its_operation
from unsloth_fast.models.protocols import Forward, LoraLinear, Placement
from unsloth_fast.models.recomputed import recomputed
from unsloth_ref.types import Float8Weight, QuantisedWeight

Operands = tuple[Tensor | QuantisedWeight, Tensor, Tensor, float, Tensor | None]  # those of lora_linear after x


def lora_placement(module: nn.Module, backend: Backend) -> Placement | str | None:
    """The operations and the forward for peft's linear layer with LoRA; None for other modules.

    The layer may be in full precision, float8 or 4 bits. For one of another class than torch's below LoRA, such as
    GPT-2's, the reason why peft computes it.

    The forward calls peft's own unless exactly one adapter is active, is not merged, and does nothing but LoRA: no
    dropout, no DoRA and the like.
    """
    if not isinstance(module, LoraLayer):  # without one, bitsandbytes is not imported
        return None
    if type(module) is Linear:
        base = module.get_base_layer()
        if is_float8(base) and not backend.fuses("lora_linear", "fp8_linear"):
            return "LoRA on a layer in float8, of which another backend computes fp8_linear"
        if not isinstance(base, nn.Linear):
            return f"LoRA on a {type(base).__name__}"
        return ("lora_linear",), _linear_forward(backend.kernels.lora_linear)
    if type(module) is not _linear_4bit():
        return None
    known = nf4.is_known(module.get_base_layer(), backend.kernels.nf4_dequantize)
    return ("lora_linear",) if known else (), _quantised_forward(backend.kernels.lora_linear)


@cache
def _linear_4bit() -> type | None:
    """peft's class for a linear layer of bitsandbytes in 4 bits; None without bitsandbytes."""
    if not is_bnb_4bit_available():
        return None
    from peft.tuners.lora.bnb import Linear4bit

    return Linear4bit


def operands_of(module: nn.Module, backend: Backend) -> Callable[[LoraLinear, torch.dtype], Operands | None] | None:
    """How to get what `lora_linear` takes beside x for a module that is placed under it; None for any other module.

    The function takes the module and the dtype of the product; it returns None where the placed forward would call
    something else.
    """
    placement = lora_placement(module, backend)
    if not isinstance(placement, tuple) or "lora_linear" not in placement[0]:
        return None
    return _linear_operands if type(module) is Linear else _quantised_operands


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer with LoRA in a module that computes it: its name, its class, and how to get its operands."""

    name: str
    kind: type
    operands: Callable[[Any, torch.dtype], Operands | None]

    @staticmethod
    def of(module: nn.Module, name: str, backend: Backend) -> "AdaptedLayer | None":
        """The layer of this name; None if it is not placed under `lora_linear`."""
        layer = module.get_submodule(name)
        operands = None if has_own_method(layer, "forward") else operands_of(layer, backend)
        return None if operands is None else AdaptedLayer(name, type(layer), operands)

    def in_module(self, module: nn.Module, dtype: torch.dtype) -> Operands | None:
        """Its operands now; None if a call of the layer would do more, or something else."""
        layer: Any = module._modules[self.name]
        is_other = type(layer) is not self.kind or is_more_than_its_operation(layer)
        return None if is_other else self.operands(layer, dtype)


def together(
    layers: Sequence[AdaptedLayer], lora_linears: Callable[..., Sequence[Tensor]]
) -> Callable[[nn.Module, Tensor], dict[str, Tensor]]:
    """A function that computes layers of a module, all of x, by their names.

    It leaves out those that do more than `lora_linear` now, and returns nothing for fewer than two.
    """

    def compute(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        dtype = product_dtype(x)
        operands = {layer.name: layer.in_module(module, dtype) for layer in layers}
        found = {name: one for name, one in operands.items() if one is not None}
        if len(found) < 2:
            return {}
        with recomputed(x):
            outputs = lora_linears(x.to(dtype), *map(list, zip(*found.values(), strict=True)))
        return dict(zip(found, outputs, strict=True))

    return compute


def _linear_operands(layer: LoraLinear, dtype: torch.dtype) -> Operands | None:
    base, adapter = layer.base_layer, _only_adapter(layer, dtype)
    weight = None if adapter is None else _weight(base, dtype)
    return None if adapter is None or weight is None else (weight, *adapter, _bias(base, dtype))


def _weight(layer: nn.Module, dtype: torch.dtype) -> Tensor | Float8Weight | None:
    """The weight of a layer that computes nothing but its product and bias; None for others."""
    if is_float8(layer) and not is_more_than_its_operation(layer):
        return Float8Weight(layer.weight.detach(), layer.weight_scale_inv.detach())
    return layer.weight.to(dtype) if _is_plain(layer) else None


def _quantised_operands(layer: LoraLinear, dtype: torch.dtype) -> Operands | None:
    base, adapter = layer.base_layer, _only_adapter(layer, dtype)
    known = adapter is not None and layer.training and getattr(base, "compute_dtype", None) == dtype
    weight = nf4.weight_of(base) if known else None
    return None if adapter is None or weight is None else (weight, *adapter, _bias(base, dtype))


def _bias(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    bias: Any = layer.bias
    return None if bias is None else bias.to(dtype)


def _linear_forward(lora_linear: Callable[..., Tensor]) -> Forward:
    def forward(self: LoraLinear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        dtype = product_dtype(x)
        operands = None if args or kwargs else _linear_operands(self, dtype)
        if operands is None:
            return type(self).forward(self, x, *args, **kwargs)
        return lora_linear(x.to(dtype), *operands)

    return forward


def _quantised_forward(lora_linear: Callable[..., Tensor]) -> Forward:
    def forward(self: LoraLinear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        dtype, base = product_dtype(x), self.base_layer
        adapter = None if args or kwargs else _only_adapter(self, dtype)
        # The layer in 4 bits casts its input to a dtype of its own, whatever autocast's is.
        own = getattr(base, "compute_dtype", None)
        if adapter is None or x.dtype != dtype != own:
            return type(self).forward(self, x, *args, **kwargs)
        x, operands = x.to(dtype), _quantised_operands(self, dtype)
        return _added(base(x), x, *adapter) if operands is None else lora_linear(x, *operands)

    return forward


def _added(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """The output of a layer, which has the dtype of x, plus that of its adapter."""
    low = nn.functional.linear(x, lora_a.to(x.dtype)).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), low, lora_b.to(x.dtype).t(), alpha=scaling).view(y.shape)


def _only_adapter(layer: LoraLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
    """Both weights and the scaling of the only active adapter, if it does nothing but LoRA; None otherwise.

    The dtype of its weights must be the one given, or wider.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    (name,) = names
    has_dropout = layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0
    if has_dropout or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    if not (_is_plain(lora_a) and _is_plain(lora_b)):
        return None
    stored = lora_a.weight.dtype
    if stored != dtype and stored.itemsize <= dtype.itemsize:
        return None
    return lora_a.weight, lora_b.weight, layer.scaling[name]


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the layer computes nothing but the product with its weight and the sum with its bias."""
    plain = type(layer) is nn.Linear and not isinstance(layer.weight, DTensor)
    return plain and not layer.weight.is_meta and not is_more_than_its_class(layer)  # accelerate loads offloaded ones

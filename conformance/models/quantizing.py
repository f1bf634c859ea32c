"""A model whose linear layers with LoRA are stored in 4 bits, as bitsandbytes stores them, or in full again."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from peft.import_utils import is_bnb_4bit_available
from torch import nn

from conformance.models.building import Subject
from conformance.tolerances.gates import Unchecked
from unsloth_fast.models.layers import read_layers

_FIRST, _LAST = "base_model.model.", ".lora_A.default.weight"  # of the name of an adapter's weight


@dataclass(frozen=True)
class RoundedSubject(Subject):
    """A model with the weights that some of its linear layers have after a quantisation in 4 bits.

    Attributes:
        layers: the names of these.
    """

    layers: tuple[str, ...] = ()

    def model(self, dtype: torch.dtype, device: str, *, experts: str | None = None) -> Any:
        """The untouched model with these weights; see `Subject.model`."""
        from bitsandbytes.functional import dequantize_4bit

        model = super().model(dtype, device, experts=experts)
        for name in self.layers:
            layer = model.get_submodule(name)
            weight: Any = _in_4_bits(layer).weight
            weight.quant_state.shape = torch.Size((1, layer.weight.numel()))  # on a CPU, rows of 32 come out wrong
            with torch.no_grad():
                layer.weight.copy_(dequantize_4bit(weight.data, weight.quant_state).view_as(layer.weight))
        return model


def layers_of(model: Any, adapter: Collection[str]) -> tuple[str, ...]:
    """The names of the layers that can be stored in 4 bits; raises Unchecked if there are none.

    Args:
        model: without an adapter.
        adapter: the names of the weights of one.
    """
    if not is_bnb_4bit_available():
        raise Unchecked("bitsandbytes is not installed")
    names = (name.removeprefix(_FIRST).removesuffix(_LAST) for name in adapter if name.endswith(_LAST))
    found = tuple(_called(model, names))
    if not found:
        raise Unchecked("no linear layer has LoRA")
    return found


def in_4_bits(model: Any, layers: Collection[str]) -> Any:
    """The model with these layers in NF4 with nested scales, as bitsandbytes stores them."""
    for name in layers:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, _in_4_bits(model.get_submodule(name)))
    model.is_loaded_in_4bit, model.is_quantized = True, True
    return model


def _called(model: Any, names: Iterator[str]) -> Iterator[str]:
    """The names of torch's linear layers that are called; the weights of others are read."""
    head, read, known = model.get_output_embeddings(), read_layers(model), dict(model.named_modules())
    for name in names:
        layer = known.get(name)
        if type(layer) is nn.Linear and layer is not head and name not in read:
            yield name


def _in_4_bits(layer: nn.Module) -> Any:
    bnb, own = cast(Any, import_module("bitsandbytes.nn")), cast(Any, layer)
    weight = own.weight.detach()
    options = {"quant_type": "nf4", "compress_statistics": True}
    made = bnb.Linear4bit(*weight.shape[::-1], own.bias is not None, weight.dtype, device=weight.device, **options)
    made.weight = bnb.Params4bit(weight.clone(), requires_grad=False, **options).to(weight.device)
    made.bias = own.bias
    made.support_avx512bf16_for_cpu = False  # it would repack the weight in evaluation, and not train with it again
    return made.train(layer.training)

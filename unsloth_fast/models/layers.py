"""Which layers does a model have? Those of its text part, of attention, of MLPs, routers, and those with LoRA."""

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_forward|ffn|expert|moe")
_OWN_ATTENTION = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"))
_OWN_MLP = frozenset(("gate_proj", "up_proj", "down_proj", "gate_up_proj"))
# The fields of a configuration with the number of outputs of a router. No class or name marks the routers' linear
# layers: they are called gate, router, classifier, wg or layer. Gemma 3n routes to its alternating updates.
_ROUTED = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "altup_num_inputs")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model, GPT-2's among them, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a layer with LoRA, not a wrapper of a parameter."""
    return isinstance(module, LoraLayer) and not hasattr(module, "parameter_name")


def last_parts(names: Iterable[str]) -> list[str]:
    """The last parts of dotted names, sorted, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


def text_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The names that belong to the model's text part, the head included: all of them for a model of text alone."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefixes = [name for name, module in model.named_modules() if module is decoder or module is head]
    if decoder is model or decoder is head or not any(prefixes):
        return set(names)
    return {name for name in names if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)}


def role(name: str) -> str | None:
    """The part of a decoder layer, "attention" or "mlp", that a module of this name is in; None for another part."""
    *parents, own = name.split(".")
    if any(_ATTENTION.search(parent) for parent in parents) or own in _OWN_ATTENTION:
        return "attention"
    return "mlp" if any(_MLP.search(parent) for parent in parents) or own in _OWN_MLP else None


def read_layers(model: nn.Module) -> set[str]:
    """The names of linear layers whose weight the module above them reads instead of calling them.

    bitsandbytes packs the weights of its layers, and peft's adapters act when a layer is called: neither works there.
    The source of the modules' classes shows it, also for code paths that only run on a GPU.
    """
    found = set()
    for name, module in model.named_modules():
        for path in _reads_of(type(module)):
            layer: Any = module
            for part in path.split("."):
                layer = getattr(layer, part, None)
            if isinstance(_unwrapped(layer), nn.Linear | Conv1D):
                found.add(_join(name, path))
    return found


def _unwrapped(layer: Any) -> Any:
    """The layer below peft's adapters."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def routers(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> set[str]:
    """Linear layers outside attention with one output per expert, or with a single output, the gate of an expert."""
    counts = router_sizes(model)
    if not counts:
        return set()
    return {name for name, layer in layers.items() if role(name) != "attention" and _outputs(layer) in counts | {1}}


def router_sizes(model: PreTrainedModel) -> set[int]:
    """The numbers of outputs of a model's routers; of most of them the number of experts."""
    config = model.config.get_text_config()
    counts: set[Any] = {getattr(config, name, None) for name in _ROUTED}
    return counts - {None, 0, 1}


def _outputs(layer: Any) -> int:
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


@cache
def _reads_of(kind: type) -> frozenset[str]:
    """The paths below `self` whose `weight` the methods of a class read, except to initialise it."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins", "peft", "bitsandbytes", "unsloth_fast"):
            continue
        tree = _classes(base.__module__).get(base.__qualname__)
        for method in tree.body if tree else ():
            if isinstance(method, ast.FunctionDef) and "init" not in method.name:
                found.update(_weights_below_self(method))
    return frozenset(found)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes at the top level of a module's source; empty without a source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):  # written in C, or made at run time
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _weights_below_self(method: ast.FunctionDef) -> Iterator[str]:
    places = {id(node.value) for node in ast.walk(method) if isinstance(node, ast.Attribute) and node.attr == "device"}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in places:
            parts, value = [], node.value
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            if parts and isinstance(value, ast.Name) and value.id == "self":
                yield ".".join(reversed(parts))


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child

"""Weights in 4 or 8 bits by bitsandbytes: whether, how, and which layers and experts keep their full width."""

import ast
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import Mxfp4Config

from unsloth_fast.models import kinds

logger = logging.getLogger(__name__)

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_forward|ffn|expert|moe")
_OWN_ATTENTION = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"))
_OWN_MLP = frozenset(("gate_proj", "up_proj", "down_proj", "gate_up_proj"))
_KEPT = ("altup",)  # structure does not show that these few weights scale all hidden states
# The fields of a configuration with the number of outputs of a router. No class or name marks the routers' linear
# layers: they are called gate, router, classifier, wg or layer. Gemma 3n routes to its alternating updates.
_ROUTED = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "altup_num_inputs")


def wanted_bits(
    load_in_4bit: bool | None,
    load_in_8bit: bool | None,
    load_in_16bit: bool,
    full_finetuning: bool,
    config: PreTrainedConfig,
    given: object = None,
) -> int | None:
    """4 or 8 to quantise the weights while they are loaded to this many bits, None to leave them.

    `given` is the user's own quantization_config. Experts that are stored in MXFP4 count as not quantised, as they are
    converted when loaded (`add_bits`); transformers then quantises nothing else.

    Raises:
        ValueError: two of 4 bits, 8 bits, load_in_16bit and full_finetuning, or 8 bits of a model stored in others.
        RuntimeError: 4 or 8 bits without bitsandbytes.
    """
    bits: dict[str, object] = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    kinds.switches(bits | {"load_in_16bit": load_in_16bit, "full_finetuning": full_finetuning})
    in_mxfp4 = _is_in_mxfp4(config)
    stored = None if in_mxfp4 else getattr(config, "quantization_config", None)
    unquantised = "full_finetuning" if full_finetuning else "load_in_16bit" if load_in_16bit else None
    asked = "load_in_8bit" if load_in_8bit else "load_in_4bit" if load_in_4bit else None
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_8bit: got True and load_in_4bit=True; allowed: one of the two")
    if unquantised and (asked or stored or given):
        other = f"{asked}=True" if asked else "a quantised model" if stored else "a quantization_config"
        raise ValueError(f"{unquantised}: got True and {other}; allowed: one of the two")
    if load_in_8bit and (in_mxfp4 or (stored and not _is_stored_in_8bit(stored))):
        raise ValueError("load_in_8bit: got True and a model that is stored quantised otherwise; allowed: False")
    if in_mxfp4 or stored or unquantised or (load_in_4bit is False and not load_in_8bit):
        return None
    installed = find_spec("bitsandbytes") is not None
    if asked and not installed:
        raise RuntimeError(f"{asked}: bitsandbytes is not installed: pip install bitsandbytes, or {asked}=False")
    return (8 if load_in_8bit else 4) if installed else None


def add_bits(
    options: dict[str, Any],
    asked: tuple[bool | None, bool | None, bool, bool],
    config: PreTrainedConfig,
    empty: Callable[[], PreTrainedModel],
) -> None:
    """Let transformers quantise the weights by bitsandbytes, if they are to be, and no configuration says how.

    Experts that are stored in MXFP4, as those of gpt-oss, are converted to the dtype: transformers cannot train them in
    MXFP4. That is logged with their size.

    Args:
        options: keywords of from_pretrained, with dtype; changed in place.
        asked: load_in_4bit, load_in_8bit, load_in_16bit and full_finetuning.
        config: of the model.
        empty: makes the model without memory.

    Raises:
        ValueError, RuntimeError: as `wanted_bits`.
    """
    bits = wanted_bits(*asked, config, options.get("quantization_config"))
    if bits and "quantization_config" not in options:
        options["quantization_config"] = bits_config(bits, options["dtype"], empty())
    if _is_in_mxfp4(config) and "quantization_config" not in options:
        options["quantization_config"] = Mxfp4Config(dequantize=True)
        logger.warning(
            "experts stored in MXFP4 become %s, as there is no training in MXFP4: they take %s%s",
            options["dtype"],
            _size(empty(), options["dtype"]),
            "; load_in_4bit=True has no effect on such a model" if asked[0] else "",
        )


def log_experts(model: Any) -> None:
    """Log how much memory the experts of a quantised model take if they are not quantised.

    Experts are one parameter for all of them. bitsandbytes quantises only linear layers, and so does float8 here.
    """
    config = getattr(model, "config", None)
    found = _expert_weights(model) if getattr(config, "quantization_config", None) else []
    if found:
        logger.warning(
            "experts are not quantised, as only linear layers are: they take %s in %s", _size(model), found[0].dtype
        )


def _expert_weights(model: Any) -> list[nn.Parameter]:
    """The weights of experts, [E, ...], in 16 bits or more."""
    counts = _counts(model)
    return [p for p in model.parameters() if p.ndim == 3 and p.shape[0] in counts and p.dtype.itemsize > 1]


def _size(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """The memory of the weights of experts, in their dtype or in this one."""
    size = sum(one.numel() * (dtype or one.dtype).itemsize for one in _expert_weights(model))
    return f"{size / 2**30:.3g} GiB"


def _is_in_mxfp4(config: PreTrainedConfig) -> bool:
    return stored_form(config).get("quant_method") == "mxfp4"


def stored_form(config: PreTrainedConfig) -> dict[str, Any]:
    """How a model is stored quantised; empty if it is not."""
    stored: Any = getattr(config, "quantization_config", None)
    form = dict(stored if isinstance(stored, dict) else stored.to_dict()) if stored else {}
    if "quant_method" in form:
        form["quant_method"] = getattr(form["quant_method"], "value", form["quant_method"])
    return form


def _is_stored_in_8bit(stored: Any) -> bool:
    return bool(stored.get("load_in_8bit") if isinstance(stored, dict) else getattr(stored, "load_in_8bit", False))


def bits_config(bits: int, dtype: torch.dtype, plain: PreTrainedModel | None = None) -> BitsAndBytesConfig:
    """bitsandbytes' NF4 with nested scales and products in this dtype, or its 8 bits.

    Args:
        bits: 4 or 8.
        dtype: of the products of 4-bit weights.
        plain: the model before it is quantised, on any device; its `kept_modules` are left out.
    """
    kept = kept_modules(plain) if plain is not None else []
    options: dict[str, Any] = {"llm_int8_skip_modules": kept} if kept else {}
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )


def kept_modules(plain: PreTrainedModel) -> list[str]:
    """The linear layers of a model that must not be quantised, for `llm_int8_skip_modules`; empty for no exception.

    They are those outside the text model, such as vision towers and projectors; routers of experts, whose rounding
    would change which expert computes; layers whose weight is read instead of called, which cannot be read in 4 bits,
    with the other layers of a Mamba mixer; and Gemma 3n's alternating updates. Each entry is the name of a module, or
    the end of names.

    transformers leaves out the head of its own accord, but only where this list is empty; so it is in a list that is
    not.
    """
    layers = _linear_layers(plain)
    outside = layers.keys() - text_names(plain, layers)
    head = plain.get_output_embeddings()
    heads = {name for name, layer in layers.items() if layer is head}
    read = read_layers(plain)
    kept = (outside - heads) | routers(plain, layers) | read | _beside_read(plain, layers, read)
    kept |= {name for name in layers if any(word in name for word in _KEPT)}
    if not kept:
        return []
    whole = {_branch(name, layers, kept) for name in outside - heads}
    ends = {_shortest_end(name, layers, kept | heads) for name in (kept - outside) | heads}
    return sorted(whole | ends)


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


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _beside_read(model: nn.Module, layers: Iterable[str], read: set[str]) -> set[str]:
    """The linear layers beside those of `read_layers` in modules that have a convolution: Mamba's mixers."""
    mixers = {name.rpartition(".")[0] for name in read}
    modules = dict(model.named_modules())
    mixers = {name for name in mixers if any(isinstance(child, nn.Conv1d) for child in modules[name].children())}
    return {name for name in layers if name.rpartition(".")[0] in mixers}


def routers(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> set[str]:
    """Linear layers outside attention with one output per expert, or with a single output, the gate of an expert."""
    counts = _counts(model)
    if not counts:
        return set()
    return {name for name, layer in layers.items() if role(name) != "attention" and _outputs(layer) in counts | {1}}


def _counts(model: PreTrainedModel) -> set[int]:
    """The numbers of outputs of a model's routers; of most of them the number of experts."""
    config = model.config.get_text_config()
    counts: set[Any] = {getattr(config, name, None) for name in _ROUTED}
    return counts - {None, 0, 1}


def _outputs(layer: Any) -> int:
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


def _branch(name: str, layers: Iterable[str], kept: set[str]) -> str:
    """The longest branch of the model that holds this layer and only layers that are kept."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length])
        if all(other in kept for other in layers if other.startswith(f"{prefix}.")):
            return prefix
    return name


def _shortest_end(name: str, layers: Iterable[str], kept: set[str]) -> str:
    """The shortest end of the name, from a dot on, that no layer to be quantised has."""
    parts = name.split(".")
    for start in reversed(range(len(parts))):
        end = ".".join(parts[start:])
        if not parts[start].isdigit() and all(other in kept for other in layers if other.endswith(end)):
            return end
    return name


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

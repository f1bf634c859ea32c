"""Weights in 4 or 8 bits by bitsandbytes: whether, how, and which layers and experts keep their full width."""

import logging
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from unsloth_fast.models import kinds
from unsloth_fast.models.layers import linear_layers, read_layers, router_sizes, routers, text_names

logger = logging.getLogger(__name__)

_KEPT = ("altup",)  # structure does not show that these few weights scale all hidden states


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
    counts = router_sizes(model)
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


def bits_config(bits: int, dtype: torch.dtype, plain: PreTrainedModel) -> BitsAndBytesConfig:
    """bitsandbytes' NF4 with nested scales and products in this dtype, or its 8 bits.

    Args:
        bits: 4 or 8.
        dtype: of the products of 4-bit weights.
        plain: the model before it is quantised, on any device; its `kept_modules` are left out.
    """
    kept = kept_modules(plain)
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
    layers = linear_layers(plain)
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


def _beside_read(model: nn.Module, layers: Iterable[str], read: set[str]) -> set[str]:
    """The linear layers beside those of `read_layers` in modules that have a convolution: Mamba's mixers."""
    mixers = {name.rpartition(".")[0] for name in read}
    modules = dict(model.named_modules())
    mixers = {name for name in mixers if any(isinstance(child, nn.Conv1d) for child in modules[name].children())}
    return {name for name in layers if name.rpartition(".")[0] in mixers}


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

"""Decisions about loading: which keywords transformers gets, and the class, the dtype and the device of a model."""

import copy
import logging
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from unsloth_fast.models.source import HUB_KEYWORDS, Source
from unsloth_ref import checks

logger = logging.getLogger(__name__)

_LOADING_KEYWORDS = (
    "attn_implementation",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "use_safetensors",
    "variant",
)
# Unsloth's keywords without a counterpart here, with the values that ask for nothing, and why others are refused.
_OFF = (False, None)
_VLLM = "vLLM is not used here"
_ABSENT = "there is no such feature here"
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "fast_inference": (_OFF, _VLLM),
    "float8_kv_cache": (_OFF, _VLLM),
    "unsloth_vllm_standby": (_OFF, _VLLM),
    "float32_mixed_precision": (_OFF, _ABSENT),
    "rope_scaling": ((None,), "its name here is rope_parameters"),
    "qat_scheme": ((None,), "there is no quantisation-aware training here"),
    "auto_model": ((None,), "the class follows from the model's configuration"),
    "whisper_language": ((None,), "speech is not trained on here"),
    "whisper_task": ((None,), "speech is not trained on here"),
}
# Those for which no value changes results: for vLLM alone, for names that Unsloth would replace, for tokenizers that it
# would repair, for its compiler. Of an image-text model only the text part is trained, whatever text_only says.
_WITHOUT_EFFECT = (
    "gpu_memory_utilization",
    "max_lora_rank",
    "disable_log_stats",
    "random_state",
    "use_exact_model_name",
    "fix_tokenizer",
    "device_map_planner_kwargs",
    "return_logits",
    "fullgraph",
    "unsloth_force_compile",
    "text_only",
)
# Those that only save memory, with the values that ask for nothing.
_SAVING_MEMORY: dict[str, tuple[object, ...]] = {
    "unsloth_tiled_mlp": _OFF,
    "offload_embedding": (*_OFF, "auto"),
}
_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NAMED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES if dtype is not None}


def known_keywords(kwargs: Mapping[str, object], config: PreTrainedConfig) -> dict[str, Any]:
    """The keywords for transformers: all except those of Unsloth that have no effect here.

    Raises:
        TypeError: a keyword that neither loading nor the config has.
        ValueError: a keyword that turns on a feature that does not exist here.
    """
    fields, known = config.to_dict(), {}
    for name, value in kwargs.items():
        off, why = _REFUSED.get(name, ((), ""))
        if name in _WITHOUT_EFFECT or value in off or value in _SAVING_MEMORY.get(name, ()):
            continue
        if name in _SAVING_MEMORY:
            logger.warning("%s: got %r, which saves no memory here; the results are the same", name, value)
        elif name in _LOADING_KEYWORDS or name in fields:
            known[name] = value
        elif off:
            raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, off))}, as {why}")
        else:
            own = ", ".join((*HUB_KEYWORDS, *_LOADING_KEYWORDS))
            raise TypeError(
                f"from_pretrained: got keyword {name!r}; allowed: {own}, a field of {type(config).__name__}"
            )
    return known


def with_fields(config: PreTrainedConfig, source: Source, options: dict[str, Any]) -> PreTrainedConfig:
    """The configuration with the fields that are among the keywords for transformers, which are taken out of them."""
    replaced = {name: options.pop(name) for name in list(options) if name not in _LOADING_KEYWORDS}
    return AutoConfig.from_pretrained(source.base, **source.base_hub, **replaced) if replaced else config


def model_class(config: PreTrainedConfig) -> Any:
    """transformers' Auto class for a configuration: of causal language models, or else of image-text models.

    Raises:
        ValueError: a model that does not generate text from text: an encoder-decoder, or one for audio alone.
    """
    code = getattr(config, "auto_map", None) or {}
    if not config.is_encoder_decoder:
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in code:
            return AutoModelForCausalLM
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in code:
            return AutoModelForImageTextToText
    raise ValueError(
        f"model_name: got a model of type {config.model_type!r}; allowed: causal language models, and image-text "
        "models, whose text part is trained"
    )


def stored_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype of a model's checkpoint; None if its configuration does not say."""
    stored: Any = config.dtype or config.get_text_config().dtype
    return stored


def empty_model(auto_class: Any, config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return auto_class.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def supported_dtype(dtype: torch.dtype | str | None, stored: torch.dtype | None = None) -> torch.dtype:
    """The dtype given; None for bfloat16 on a GPU that supports it, float16 on another GPU, float32 on a CPU.

    Args:
        dtype: a dtype, its name, such as "bfloat16" or "torch.bfloat16", or "auto" for the stored one.
        stored: the dtype of the model's checkpoint. "auto" is None without it, and float16 on a GPU that does not
            support it, which is logged.

    Raises:
        ValueError: a dtype that models are not loaded in, or bfloat16 on a GPU that does not support it.
    """
    automatic = isinstance(dtype, str) and dtype == "auto"
    named = stored if automatic else _NAMED_DTYPES.get(str(dtype).removeprefix("torch."), dtype)
    checks.one_of("dtype", named, _DTYPES)
    dtype = cast(torch.dtype | None, named)
    if not torch.cuda.is_available():
        return dtype or torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype is torch.bfloat16 and not has_bfloat16:
        card = torch.cuda.get_device_name()
        if not automatic:
            raise ValueError(
                f"dtype: got {dtype}; allowed: None, torch.float16, torch.float32, as {card} has no bfloat16"
            )
        logger.warning("dtype: torch.float16 in place of %s, the checkpoint's, as %s has no bfloat16", dtype, card)
        dtype = None
    return dtype or (torch.bfloat16 if has_bfloat16 else torch.float16)


def default_device_map() -> dict[str, str] | None:
    """This process's GPU, by LOCAL_RANK; None without a GPU."""
    return {"": f"cuda:{os.environ.get('LOCAL_RANK', 0)}"} if torch.cuda.is_available() else None

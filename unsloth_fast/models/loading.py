"""What loading a model needs to know: where its parts are, what its dtype is to be, how its tokenizer pads."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftConfig
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from unsloth_ref import checks

logger = logging.getLogger(__name__)

# Keywords that say where files come from, for the config, the model and the tokenizer alike.
HUB_KEYWORDS = ("revision", "cache_dir", "local_files_only", "force_download", "subfolder")
_LOADING_KEYWORDS = (
    "attn_implementation",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "use_safetensors",
    "variant",
)
# Unsloth's keywords without an effect here: the values that ask for nothing, or None where all do: those for vLLM, for
# names that Unsloth would replace, and for tokenizers that it would repair.
_OFF = (False, None)
_WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "load_in_8bit": _OFF,
    "load_in_fp8": _OFF,
    "fast_inference": _OFF,
    "float8_kv_cache": _OFF,
    "unsloth_vllm_standby": _OFF,
    "unsloth_tiled_mlp": _OFF,
    "text_only": _OFF,
    "float32_mixed_precision": _OFF,
    "offload_embedding": (*_OFF, "auto"),
    "rope_scaling": (None,),
    "resize_model_vocab": (None,),
    "qat_scheme": (None,),
    "device_map_planner_kwargs": (None,),
    "gpu_memory_utilization": None,
    "max_lora_rank": None,
    "disable_log_stats": None,
    "random_state": None,
    "use_exact_model_name": None,
    "fix_tokenizer": None,
}
_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
)


def adapter_base(name: str, hub: dict[str, Any]) -> str | None:
    """The name of the base model if `name` is that of an adapter, else None.

    Raises:
        ValueError: an adapter that does not name its base model.
    """
    known = {key: hub[key] for key in ("token", "revision", "cache_dir", "local_files_only", "subfolder") if key in hub}
    if find_adapter_config_file(name, **known) is None:
        return None
    base = PeftConfig.from_pretrained(name, **known).base_model_name_or_path
    if not base:
        raise ValueError(f"model_name: got {name!r}, an adapter without base_model_name_or_path; allowed: one with")
    return base


def tokenizer_name(name: str, base_name: str, hub: dict[str, Any]) -> str:
    """Where the tokenizer is: an adapter's folder need not have one."""
    known = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    found = cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **known)
    return name if found else base_name


def known_keywords(kwargs: dict[str, Any], config: Any) -> dict[str, Any]:
    """The keywords for transformers: all but those of Unsloth that have no effect here.

    Raises:
        TypeError: a keyword that is neither of loading nor a field of the config.
        ValueError: one that turns on what does not exist here.
    """
    fields, known = config.to_dict(), {}
    for name, value in kwargs.items():
        off = _WITHOUT_EFFECT.get(name, ())
        if off is None or value in off:
            continue
        if name in _LOADING_KEYWORDS or name in fields:
            known[name] = value
        elif off:
            why = "rope_parameters is its name here" if name == "rope_scaling" else "there is no such feature"
            raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, off))}, as {why}")
        else:
            own = ", ".join((*HUB_KEYWORDS, *_LOADING_KEYWORDS))
            raise TypeError(
                f"from_pretrained: got keyword {name!r}; allowed: {own}, a field of {type(config).__name__}"
            )
    return known


def position_limit(config: Any, replaced: dict[str, Any]) -> int | None:
    """The positions that a model is made for, after keywords that replace fields of its config; None for any."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return replaced.get("max_position_embeddings", limit)


def check_length(length: int | None, limit: int | None) -> None:
    """Raise ValueError for a max_seq_length below 1 or beyond the model's positions."""
    if length is None:
        return
    checks.in_range("max_seq_length", length, 1)
    if limit is not None and length > limit:
        raise ValueError(
            f"max_seq_length: got {length}; allowed: 1 to {limit}, the model's max_position_embeddings. For longer"
            " texts by RoPE scaling pass from_pretrained both max_position_embeddings and rope_parameters"
        )


def supported_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the weights: as asked for, else bfloat16 on a GPU that has it, float16 on others, float32 on a CPU.

    Raises:
        ValueError: none that models are loaded in, or bfloat16 on a GPU that does not have it.
    """
    checks.one_of("dtype", dtype, _DTYPES)
    if not torch.cuda.is_available():
        return dtype or torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype is torch.bfloat16 and not has_bfloat16:
        card = torch.cuda.get_device_name()
        raise ValueError(f"dtype: got {dtype}; allowed: None, torch.float16, torch.float32, as {card} has no bfloat16")
    return dtype or (torch.bfloat16 if has_bfloat16 else torch.float16)


def wants_4bit(load_in_4bit: bool | None, load_in_16bit: bool, full_finetuning: bool, config: Any) -> bool:
    """Whether the weights are to be quantised while they are loaded.

    Raises:
        ValueError: weights in 4 bits that are to be in 16, or trained.
        RuntimeError: 4 bits without bitsandbytes.
    """
    stored = getattr(config, "quantization_config", None)
    plain = "full_finetuning" if full_finetuning else "load_in_16bit" if load_in_16bit else None
    if plain and (load_in_4bit or stored):
        seen = "load_in_4bit=True" if load_in_4bit else "a quantised model"
        raise ValueError(f"{plain}: got True and {seen}; allowed: one of the two")
    if stored or plain or load_in_4bit is False:
        return False
    installed = find_spec("bitsandbytes") is not None
    if load_in_4bit and not installed:
        raise RuntimeError(
            "load_in_4bit: bitsandbytes is not installed: pip install bitsandbytes, or load_in_4bit=False"
        )
    return installed


def prepare_tokenizer(tokenizer: Any, model: Any, max_seq_length: int | None) -> None:
    """Set the length, padding on the right, and a pad token, which is not the end of a text where that can be had."""
    tokenizer.padding_side = "right"
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        candidates = (*_PAD_TOKENS, tokenizer.unk_token)
        pad = next((token for token in candidates if token in vocabulary and token != tokenizer.eos_token), None)
        if pad is None and len(tokenizer) < model.get_input_embeddings().num_embeddings:
            pad = "<pad>"  # a new token: the embedding has a row to spare
        tokenizer.add_special_tokens({"pad_token": pad or tokenizer.eos_token})
        logger.warning("tokenizer: it has no pad token; %r is taken", tokenizer.pad_token)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id

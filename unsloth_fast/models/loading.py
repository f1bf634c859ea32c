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
_ABSENT = ("load_in_8bit", "fast_inference")  # known to Unsloth's users; may be passed, as off
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
    """The keywords for transformers: all but those that turn off what does not exist here.

    Raises:
        TypeError: a keyword that is neither of loading nor a field of the config.
        ValueError: one that turns on what does not exist here.
    """
    for name in _ABSENT:
        if kwargs.get(name):
            raise ValueError(f"{name}: got {kwargs[name]!r}; allowed: False, there is no such feature")
    fields = config.to_dict()
    known = {name: value for name, value in kwargs.items() if name not in _ABSENT}
    for name in known:
        if name not in _LOADING_KEYWORDS and name not in fields:
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


def wants_4bit(load_in_4bit: bool | None, full_finetuning: bool, config: Any) -> bool:
    """Whether the weights are to be quantised while they are loaded.

    Raises:
        ValueError: weights in 4 bits that are to be trained.
        RuntimeError: 4 bits without bitsandbytes.
    """
    stored = getattr(config, "quantization_config", None)
    if full_finetuning and (load_in_4bit or stored):
        seen = "load_in_4bit=True" if load_in_4bit else "a quantised model"
        raise ValueError(f"full_finetuning: got True and {seen}; allowed: one of the two, such weights are not trained")
    if stored or full_finetuning or load_in_4bit is False:
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

"""Decisions about loading: where a model's parts are, its class and dtype, and how its tokenizer pads."""

import copy
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from unsloth_fast.models import kinds
from unsloth_fast.models.protocols import CausalLM
from unsloth_ref import checks

logger = logging.getLogger(__name__)

# Keywords for where files come from; the config, the model and the tokenizer all take them.
HUB_KEYWORDS = ("revision", "cache_dir", "local_files_only", "force_download", "subfolder")
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
_PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
)


@dataclass(frozen=True)
class Source:
    """Where the parts of a model are, on the hub or on disk.

    Attributes:
        name: of the model or of an adapter, as the user gave it.
        is_adapter: whether the name is that of an adapter.
        base: the name of the model below the adapter; `name` without an adapter.
        hub: keywords for where the files of `name` come from.
    """

    name: str
    is_adapter: bool
    base: str
    hub: dict[str, Any]

    @property
    def base_hub(self) -> dict[str, Any]:
        """Keywords for the files of the base model: an adapter's revision and subfolder are its own."""
        return _without(self.hub, "revision", "subfolder") if self.is_adapter else self.hub

    @property
    def adapter_hub(self) -> dict[str, Any]:
        """Keywords for the files of the adapter, which holds no code."""
        return _without(self.hub, "trust_remote_code")

    def find_tokenizer(self) -> str:
        """The name to load the tokenizer by: an adapter's folder need not have one."""
        file = "tokenizer_config.json"
        found = cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **self.adapter_hub)
        return self.name if found else self.base


def find_source(name: str, hub: Mapping[str, object]) -> Source:
    """Find out whether the name is that of an adapter, and of which model.

    Raises:
        ValueError: no name, or an adapter that does not name its base model.
        FileNotFoundError: a folder that does not exist, or that holds no model.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"model_name: got {name!r}; allowed: a name on the hub, or the path of a folder")
    if "subfolder" not in hub:
        _check_folder(str(name))
    keywords: dict[str, Any] = dict(hub)
    adapter_keywords = _without(keywords, "trust_remote_code", "force_download")
    if find_adapter_config_file(name, **adapter_keywords) is None:
        return Source(name, False, name, keywords)
    base = PeftConfig.from_pretrained(name, **adapter_keywords).base_model_name_or_path
    if not base:
        raise ValueError(f"model_name: got {name!r}, an adapter without base_model_name_or_path; allowed: one with it")
    return Source(name, True, base, keywords)


def _check_folder(name: str) -> None:
    """Refuse a missing folder, which the hub would take for a malformed name, and one that only holds checkpoints."""
    folder = Path(name)
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1
    if is_path and not folder.exists():
        raise FileNotFoundError(
            f"model_name: got {name!r}, which does not exist (from {Path.cwd()}); allowed: the folder of a model or an "
            "adapter, or a name on the hub"
        )
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        inside = sorted(path.name for path in folder.glob("checkpoint-*")) or "no checkpoint either"
        raise FileNotFoundError(
            f"model_name: got {name!r}, a folder without config.json or adapter_config.json; allowed: the folder of a "
            f"model or an adapter; inside it: {inside}"
        )


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


def resize_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, asked: int | None = None
) -> None:
    """Give a model the number of token embeddings that was asked for, or that its adapter was trained with.

    The adapter's weights show the number. Where they do not, the model gets a row for each token of the adapter's
    tokenizer, and no fewer than it has.

    Args:
        model: the model, without the adapter.
        tokenizer: of the adapter if it has one.
        source: where both come from.
        asked: the number to resize to; None for the adapter's.

    Raises:
        ValueError: fewer than 1.
    """
    rows: Any = model.get_input_embeddings().num_embeddings
    if asked is not None:
        kinds.whole("resize_model_vocab", asked, 1)
        if asked < len(tokenizer):
            logger.warning("resize_model_vocab: got %d, fewer than the tokenizer's %d tokens", asked, len(tokenizer))
    elif source.is_adapter:
        asked = _rows_of_adapter(model, source)
        if asked is None and source.find_tokenizer() == source.name:
            asked = max(rows, len(tokenizer))
    if asked not in (None, rows):
        logger.info("the model's %d token embeddings become %d", rows, asked)
        model.resize_token_embeddings(asked)


def grow_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Give a model a row for each token, and no fewer than it has."""
    rows: Any = model.get_input_embeddings().num_embeddings
    if tokens > rows:
        logger.info("the model's %d token embeddings become %d", rows, tokens)
        model.resize_token_embeddings(tokens)


def _rows_of_adapter(model: Any, source: Source) -> int | None:
    """How many tokens the embedding or the head has for which an adapter holds weights; None if it holds none."""
    options = {"_raise_exceptions_for_missing_entries": False, **source.adapter_hub}
    path = cached_file(source.name, "adapter_model.safetensors", **options)
    if path is None:
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # the file is not a mapping
            for name in names:
                # In full, or the output side of LoRA on the head, or the input side of LoRA on the embedding.
                dimensions = {"weight": 0, "base_layer.weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}
                dimension = dimensions.get(key.rpartition(f".{name}.")[2])
                if dimension is not None:
                    return file.get_slice(key).get_shape()[dimension]
    return None


def find_template(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Give a tokenizer without a chat template that of its processor, if there is a file with one."""
    if tokenizer.chat_template is None:
        options = {"_raise_exceptions_for_missing_entries": False, **source.adapter_hub}
        path = cached_file(source.find_tokenizer(), "chat_template.json", **options)
        if path is not None:
            tokenizer.chat_template = json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, model: CausalLM, max_seq_length: int | None) -> None:
    """Set the length, padding on the right, and a pad token: if possible not the one that ends a text."""
    tokenizer.padding_side = "right"
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    if tokenizer.pad_token is None:
        pad: Any = _unused_token(tokenizer, model) or tokenizer.eos_token
        tokenizer.add_special_tokens({"pad_token": pad})
        logger.warning("tokenizer: it has no pad token; using %r", tokenizer.pad_token)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _unused_token(tokenizer: Any, model: Any) -> str | None:
    """A token that no text contains: one of the vocabulary, or a new one if the embedding has a row for it."""
    vocabulary = tokenizer.get_vocab()
    for token in (*_PAD_TOKENS, tokenizer.unk_token):
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    return "<pad>" if len(tokenizer) < model.get_input_embeddings().num_embeddings else None


def _without(keywords: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name not in names}

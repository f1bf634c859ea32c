"""The contract of `unsloth_ref`, fast: Triton kernels, training pieces, and a trainer over TRL.

Importing this package loads neither triton, transformers nor trl; they are loaded by the names that need them. The
first import of a loader, such as `from unsloth_fast import FastLanguageModel`, also calls `compat.patch_trl`.
"""

import logging
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from unsloth_fast.unsupported import demand_extra, missing

if TYPE_CHECKING:
    from unsloth_fast.chat_templates import (
        apply_chat_template,
        get_chat_template,
        standardize_data_formats,
        standardize_sharegpt,
        to_sharegpt,
        train_on_responses_only,
    )
    from unsloth_fast.config import UnslothTrainingArguments
    from unsloth_fast.devices import is_bf16_supported, is_bfloat16_supported, is_vLLM_available
    from unsloth_fast.language_model import (
        FastCohereModel,
        FastFalconH1Model,
        FastGemma2Model,
        FastGemma3Model,
        FastGemmaModel,
        FastGraniteModel,
        FastLanguageModel,
        FastLlamaModel,
        FastMistralModel,
        FastModel,
        FastPhi3Model,
        FastQwen2Model,
        FastQwen3Model,
        FastQwen3MoeModel,
        FastTextModel,
        PatchDPOTrainer,
        PatchKTOTrainer,
    )
    from unsloth_fast.tokenizer_utils import add_new_tokens
    from unsloth_fast.trainer import UnslothTrainer, unsloth_train

__version__ = "0.1.0"

# The modules of the names in `__all__` that are not in language_model.
_MODULES = {
    "UnslothTrainer": "trainer",
    "UnslothTrainingArguments": "config",
    "add_new_tokens": "tokenizer_utils",
    "apply_chat_template": "chat_templates",
    "get_chat_template": "chat_templates",
    "is_bf16_supported": "devices",
    "is_bfloat16_supported": "devices",
    "is_vLLM_available": "devices",
    "standardize_data_formats": "chat_templates",
    "standardize_sharegpt": "chat_templates",
    "to_sharegpt": "chat_templates",
    "train_on_responses_only": "chat_templates",
    "unsloth_train": "trainer",
}

__all__ = [
    "FastCohereModel",
    "FastFalconH1Model",
    "FastGemma2Model",
    "FastGemma3Model",
    "FastGemmaModel",
    "FastGraniteModel",
    "FastLanguageModel",
    "FastLlamaModel",
    "FastMistralModel",
    "FastModel",
    "FastPhi3Model",
    "FastQwen2Model",
    "FastQwen3Model",
    "FastQwen3MoeModel",
    "FastTextModel",
    "PatchDPOTrainer",
    "PatchKTOTrainer",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "add_new_tokens",
    "apply_chat_template",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "is_vLLM_available",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
]


def _is_relevant(record: logging.LogRecord) -> bool:
    """False for bitsandbytes' warning that it lacks a 4-bit kernel for this CPU, which it logs on every import."""
    return "gemm_4bit_forward" not in record.msg


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_relevant)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise missing(__name__, name)
    try:
        if name.startswith("Fast"):
            _patch_trl_once()
        return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'language_model')}"), name)
    except ModuleNotFoundError as error:
        demand_extra(name, error)
        raise


@cache  # so that a later use of a name does not undo `compat.unpatch_trl`
def _patch_trl_once() -> None:
    """Patch TRL for a script whose import line names a loader: its arguments are often made before its model."""
    import_module(f"{__name__}.compat").patch_trl()

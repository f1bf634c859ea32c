"""The arguments of the methods that save: which are allowed, and which of Unsloth's ask for nothing here."""

import inspect
import re
from collections.abc import Mapping
from types import FunctionType

import torch
from torch import nn

from unsloth_fast.models.head import without_adapter
from unsloth_ref import checks

SAVE_METHODS = ("merged_16bit", "merged_4bit", "merged_4bit_forced", "lora")
SIXTEEN = (torch.bfloat16, torch.float16)
# The keywords of `save_pretrained_merged`, to which the other methods pass theirs.
_KEYWORDS = ("dtype", "max_shard_size", "is_main_process")
# Unsloth's keywords that change nothing here: nothing temporary is kept, only safetensors are written, and the methods
# for the hub have their own token and private.
_WITHOUT_EFFECT = (
    *("maximum_memory_usage", "temporary_location", "safe_serialization", "use_temp_dir", "first_conversion"),
    *("token", "private"),
)
# Unsloth's keywords without a counterpart here, with the values that ask for nothing, and why others are refused.
_NO_CARD = "no model card is written"
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "push_to_hub": ((False, None), "push_to_hub_merged(repo_id, tokenizer) or push_to_hub_gguf uploads"),
    "state_dict": ((None,), "the model's own weights are saved"),
    "save_function": ((None, torch.save), "safetensors writes the files"),
    "variant": ((None,), "the files have their usual names"),
    "save_peft_format": ((True, None), "adapters are saved in peft's format alone"),
    "tags": ((None, [], ()), _NO_CARD),
    "datasets": ((None, [], ()), _NO_CARD),
}


def check_saving(method: FunctionType, model: nn.Module, save_method: str, options: Mapping[str, object]) -> None:
    """Raise for an argument of a method that saves a merged model.

    Args:
        method: the function that was called; messages name it.
        model: the model to be saved.
        save_method: as in `save_pretrained_merged`.
        options: its other keywords.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an unknown save_method, dtype or size; "lora" for a model without adapters; a keyword that asks for
            what does not exist here.
    """
    for name, value in options.items():
        if name in _REFUSED:
            nothing, why = _REFUSED[name]
            if not any(value is entry or (type(value) is type(entry) and value == entry) for entry in nothing):
                shown = f"a {type(value).__name__}" if name == "state_dict" else repr(value)
                allowed = ", ".join("torch.save" if entry is torch.save else repr(entry) for entry in nothing)
                raise ValueError(f"{name}: got {shown}; allowed: {allowed}, as {why}")
        elif name not in (*_WITHOUT_EFFECT, *_KEYWORDS):
            parameters = inspect.signature(method).parameters.values()
            own = [entry.name for entry in parameters if entry.kind is entry.KEYWORD_ONLY]
            allowed = ", ".join(dict.fromkeys((*_KEYWORDS, *own, *_WITHOUT_EFFECT, *_REFUSED)))
            raise TypeError(f"{method.__name__}: got keyword {name!r}; allowed: {allowed}")
    checks.one_of("save_method", save_method, SAVE_METHODS)
    checks.one_of("dtype", options.get("dtype"), (None, *SIXTEEN))
    size = options.get("max_shard_size", 1)
    if not (size > 0 if isinstance(size, int) else re.fullmatch(r"(?i)\s*\d+(\.\d+)?\s*[KMGT]B\s*", str(size))):
        raise ValueError(f"max_shard_size: got {size!r}; allowed: a number of bytes from 1, or a text such as '5GB'")
    if save_method == "lora" and model is without_adapter(model):
        raise ValueError(
            f"save_method: got 'lora' for a {type(model).__name__}; allowed: 'lora' for a peft.PeftModel, or "
            "'merged_16bit'"
        )

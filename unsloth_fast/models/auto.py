"""`peft.AutoPeftModelForCausalLM` with load_in_4bit and load_in_8bit, which transformers 5 no longer accepts."""

from typing import Any

from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig

from unsloth_fast.models import loading
from unsloth_fast.models.quantization import bits_config
from unsloth_fast.models.source import HUB_KEYWORDS, find_source

_NAME = "from_pretrained"


def accept_bits() -> None:
    """Let `AutoPeftModelForCausalLM.from_pretrained` take load_in_4bit and load_in_8bit.

    They become a `quantization_config`: NF4 with nested scales, as in `FastLanguageModel`, or bitsandbytes' 8 bits.
    A second call has no effect; `refuse_bits` is the inverse.
    """
    if _NAME not in vars(AutoPeftModelForCausalLM):
        setattr(AutoPeftModelForCausalLM, _NAME, classmethod(_from_pretrained))


def refuse_bits() -> None:
    """Undo `accept_bits`."""
    if _NAME in vars(AutoPeftModelForCausalLM):
        delattr(AutoPeftModelForCausalLM, _NAME)


def _from_pretrained(
    cls: Any, name: str, *positional: Any, load_in_4bit: bool = False, load_in_8bit: bool = False, **keywords: Any
) -> Any:
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_8bit: got True and load_in_4bit=True; allowed: one of the two")
    if load_in_4bit or load_in_8bit:
        hub = {key: keywords[key] for key in (*HUB_KEYWORDS, "token", "trust_remote_code") if key in keywords}
        source = find_source(name, hub)
        model_config = AutoConfig.from_pretrained(source.base, **source.base_hub)
        trusted = bool(hub.get("trust_remote_code"))
        plain = loading.empty_model(loading.model_class(model_config), model_config, trusted)
        asked = keywords.get("dtype", keywords.get("torch_dtype"))
        dtype = loading.supported_dtype(asked, loading.stored_dtype(model_config))
        keywords.setdefault("quantization_config", bits_config(4 if load_in_4bit else 8, dtype, plain))
    inherited: Any = super(AutoPeftModelForCausalLM, cls)
    return inherited.from_pretrained(name, *positional, **keywords)

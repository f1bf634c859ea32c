"""`peft.AutoPeftModelForCausalLM` with load_in_4bit and load_in_8bit, which transformers 5 no longer accepts."""

from typing import Any

from peft import AutoPeftModelForCausalLM
from transformers import BitsAndBytesConfig

from unsloth_fast.models import loading

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
        dtype = keywords.get("dtype", keywords.get("torch_dtype"))
        four = loading.nf4_config(loading.supported_dtype(None if isinstance(dtype, str) else dtype))
        config = four if load_in_4bit else BitsAndBytesConfig(load_in_8bit=True)
        keywords.setdefault("quantization_config", config)
    inherited: Any = super(AutoPeftModelForCausalLM, cls)
    return inherited.from_pretrained(name, *positional, **keywords)

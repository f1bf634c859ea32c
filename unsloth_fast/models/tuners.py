"""Which of peft's adapters do more than their layers: to what a forward returns, or to the documents of a row?"""

from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def own_forward(adapter: Any) -> str | None:
    """The class of an adapter's model if that has a forward of its own, as AdaLoRA has for a term of the loss.

    Args:
        adapter: a `peft.PeftConfig`; None for no adapter.
    """
    tuner = None if adapter is None else PEFT_TYPE_TO_TUNER_MAPPING.get(adapter.peft_type)
    return None if tuner is None or getattr(tuner, "forward", None) is BaseTuner.forward else tuner.__name__


def obstacle_to_packing(adapter: Any) -> str | None:
    """Why the documents of a row may not be kept apart under an adapter; None if they are.

    Args:
        adapter: a `peft.PeftConfig`; None for no adapter.
    """
    if getattr(adapter, "is_prompt_learning", False):
        return "prompt learning puts positions before each row that belong to no document"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "the adapter looks for its alora_invocation_tokens once in each row, not in each document"
    if name := own_forward(adapter):
        return f"the adapter has a forward of its own ({name}), which may take a row for one document"
    return None


def refuse_bypassed_forward(model: Any) -> None:
    """Raise ValueError for an adapter that keeps the forward that the language model had, in which there is no loss."""
    tuner = getattr(model, "base_model", None)
    if isinstance(model, PeftModel) and tuner is not model.get_base_model() and "forward" in vars(tuner):
        raise ValueError(
            f"peft_config: got {type(model.active_peft_config).__name__}, whose {type(tuner).__name__} calls the "
            "forward that the model had before the trainer, which computes no loss; allowed: LoRA, or another adapter"
        )

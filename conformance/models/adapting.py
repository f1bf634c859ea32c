"""Which adapter is a model judged with? LoRA on every linear layer and expert; embedding and head trained in full."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from conformance.gates import Unchecked
from unsloth_fast import FastLanguageModel

RANK = 2
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # parameters of experts that get LoRA by these names


def adapted(model: Any) -> Any:
    """The model with the adapter, with random weights, B included; raises Unchecked."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = (nn.Linear.forward, Conv1D.forward)  # a router's forward may return more
    linear = {n for n, layer in model.named_modules() if type(layer).forward in own and layer is not head}
    names = sorted({_last_word(name) for name in linear})
    saved = [name.rpartition(".")[2] for name, module in model.named_modules() if module in (embedding, head)]
    options: dict[str, Any] = {"use_gradient_checkpointing": False, "init_lora_weights": False, "lora_alpha": 2 * RANK}
    try:
        return FastLanguageModel.get_peft_model(
            model, RANK, [*names, *EXPERT_WEIGHTS], modules_to_save=saved, **options
        )
    except ValueError as refused:
        raise Unchecked(f"get_peft_model refuses: {refused}") from refused


def _last_word(name: str) -> str:
    """The end of a name from its last part that is not a number: "ffn.0", as peft takes "0" for layers too."""
    parts = name.split(".")
    first = max((place for place, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[first:])

"""Which adapter is a model judged with? LoRA on every linear layer and expert; embedding and head trained in full."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conformance.tolerances.gates import Unchecked
from conformance.trial import Caught
from unsloth_fast import FastLanguageModel

RANK = 2
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # parameters of experts that get LoRA by these names


def adapted(model: Any) -> Any:
    """The model with the adapter, with random weights, B included; raises Unchecked."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linear = {n for n, layer in model.named_modules() if _is_linear(layer) and layer is not head}
    names = sorted({_last_word(name) for name in linear})
    saved = [name.rpartition(".")[2] for name, module in model.named_modules() if module in (embedding, head)]
    options: dict[str, Any] = {"use_gradient_checkpointing": False, "init_lora_weights": False, "lora_alpha": 2 * RANK}
    try:
        return FastLanguageModel.get_peft_model(
            model, RANK, [*names, *EXPERT_WEIGHTS], modules_to_save=saved, **options
        )
    except ValueError as refused:
        raise Unchecked(f"get_peft_model refuses: {refused}") from refused


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer returns its product alone: a router returns more, and one of groups takes other inputs."""
    if not isinstance(layer, nn.Linear | Conv1D):
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    with Caught(), torch.no_grad():
        y = layer(layer.weight.new_zeros(1, layer.weight.shape[1]))
        return isinstance(y, Tensor) and y.shape == (1, layer.weight.shape[0])
    return False


def _last_word(name: str) -> str:
    """The end of a name from its last part that is not a number: "ffn.0", as peft takes "0" for layers too."""
    parts = name.split(".")
    first = max((place for place, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[first:])

"""Which adapters is a model judged with?"""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conformance.tolerances.gates import Unchecked
from conformance.trial import Caught
from unsloth_fast import FastLanguageModel

AdapterKind = Literal["usual", "ends", "dora"]

RANK = 2
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # parameters of experts that get LoRA by these names


def with_adapter(model: Any, *, kind: AdapterKind = "usual", dropout: float = 0.0) -> Any:
    """The model with the adapter, with random weights, B included; raises Unchecked.

    Args:
        model: an untouched one.
        kind: "usual" for LoRA on every linear layer and expert, with embedding and head trained in full; "ends" for
            LoRA on embedding and head too, scaled by the root of the rank; "dora" for DoRA instead of LoRA.
        dropout: of the input of LoRA.
    """
    both = model.get_input_embeddings(), model.get_output_embeddings()
    of_ends = [name for name, module in model.named_modules() if module in both]
    linear = {name for name, layer in model.named_modules() if is_linear(layer) and layer not in both}
    others = {name for name, _ in model.named_modules() if name not in linear}
    names = sorted({name if _ends_any(others, _last_word(name)) else _last_word(name) for name in linear})
    options: dict[str, Any] = {"use_gradient_checkpointing": False, "init_lora_weights": False, "lora_alpha": 2 * RANK}
    targets: Any = [*names, *EXPERT_WEIGHTS]
    if kind != "usual" or dropout:  # a pattern: names stand for experts too, and for an embedding trained in full
        targets = rf"(.*\.)?({'|'.join(map(re.escape, (*names, *(of_ends if kind == 'ends' else ()))))})"
    if kind != "ends":
        options["modules_to_save"] = [name.rpartition(".")[2] for name in of_ends]
    options |= {"lora_dropout": dropout, "use_dora": kind == "dora", "use_rslora": kind == "ends"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = FastLanguageModel.get_peft_model(model, RANK, targets, **options)
        except ValueError as refused:
            raise Unchecked(f"get_peft_model refuses: {refused}") from refused
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:  # with the norm of the weights, DoRA computes what LoRA does
                parameter.data.mul_(1 + torch.rand_like(parameter))
    return model


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer returns its product alone: a router returns more, and one of groups takes other inputs."""
    if not isinstance(layer, nn.Linear | Conv1D):
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    inputs, outputs = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape
    dtype = layer.weight.dtype if layer.weight.is_floating_point() else None  # None for one in 4 bits
    with Caught(), torch.no_grad():
        y = layer(torch.zeros(1, inputs, dtype=dtype, device=layer.weight.device))
        return isinstance(y, Tensor) and y.shape == (1, outputs)
    return False


def _ends_any(names: Iterable[str], last: str) -> bool:
    """Whether peft would take the end of a name for one of these modules too."""
    return any(f".{name}".endswith(f".{last}") for name in names)


def _last_word(name: str) -> str:
    """The end of a name from its last part that is not a number: "ffn.0", as peft takes "0" for layers too."""
    parts = name.split(".")
    first = max((place for place, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[first:])

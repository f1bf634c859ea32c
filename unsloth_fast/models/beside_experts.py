"""Which layers have no LoRA though others of the same names have: dense layers beside experts, or the experts."""

import logging
import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.layers import is_lora, last_parts, text_names

logger = logging.getLogger(__name__)

_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # what layers of experts were called
_STACKED = (".gate_up_proj", ".down_proj")  # what their weights are called, in one parameter for all experts


def layers_beside_experts(base: PreTrainedModel) -> set[str]:
    """The linear layers of the text model without LoRA that have names of experts', where the experts have LoRA.

    In most mixtures of experts, such as Qwen's and DeepSeek's, peft takes these names for the weights of experts alone.
    """
    modules = dict(base.named_modules())
    if not _adapts_experts(base):
        return set()
    adapted = last_parts(name for name, module in modules.items() if is_lora(module))
    named = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    of_experts = {name for name in named if name.rpartition(".")[2] in set(_OF_EXPERTS).difference(adapted)}
    return text_names(base, of_experts)


def _adapts_experts(base: nn.Module) -> bool:
    """Whether LoRA is on a parameter for all experts, [E, O, I]; `target_parameters` may name a matrix too."""
    wrappers = (module for module in base.modules() if isinstance(module, ParamWrapper))
    return any(getattr(each.get_base_layer(), each.parameter_name).ndim == 3 for each in wrappers)


def _experts_without_lora(base: PreTrainedModel) -> set[str]:
    """The experts of the text model, whose weights are [E, O, I], if dense layers of their names have LoRA alone."""
    modules = dict(base.named_modules())
    adapted = last_parts(name for name, module in modules.items() if is_lora(module))
    if set(_OF_EXPERTS).isdisjoint(adapted) or _adapts_experts(base):
        return set()
    weights = (name for name, weight in base.named_parameters() if weight.ndim == 3)
    return text_names(base, {name.rpartition(".")[0] for name in weights if name.endswith(_STACKED)})


def warn_of_layers_left(model: nn.Module) -> None:
    """Warn of dense layers beside experts without LoRA, or of the experts, once for each model.

    Names such as gate_proj stand for both, and peft takes them for one of the two, depending on the architecture.
    """
    base: Any = without_adapter(model)
    if getattr(base, "unsloth_left_layers", False):
        return
    dense, experts = layers_beside_experts(base), _experts_without_lora(base)
    base.unsloth_left_layers = bool(dense or experts)
    if dense:
        logger.warning(
            "target_modules: no LoRA on %s: peft takes these names for the experts' weights alone", _listed(dense)
        )
    elif experts:
        logger.warning(
            "target_modules: no LoRA on the weights of %s, only on dense layers beside them; gate_proj, up_proj and "
            "down_proj in get_peft_model, or target_parameters, mean these weights too",
            _listed(experts),
        )


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", path) for path in paths}))

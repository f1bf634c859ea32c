"""Adding an adapter to a model: its arguments, an adapter that is there already, and the dtype of what is trained."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.targets import EMBEDDING_NAMES, Targets
from unsloth_ref import checks

logger = logging.getLogger(__name__)

_COMPARED = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "layers_to_transform")
_NOT_COMPARED = ("init_lora_weights", "loftq_config", "ensure_weight_tying", "target_parameters", "exclude_modules")


def check_arguments(r: int, dropout: float, bias: str, vision: bool | None, kwargs: dict[str, Any]) -> None:
    """Raise for an argument of `get_peft_model` that is not allowed; take task_type out of kwargs."""
    checks.in_range("r", r, 1)
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout: got {dropout!r}; allowed: at least 0 and below 1")
    checks.one_of("bias", bias, ("none", "all", "lora_only"))
    if vision:
        raise ValueError(
            f"finetune_vision_layers: got {vision!r}; allowed: False, None, as only text is trained on here"
        )
    task = kwargs.pop("task_type", None)
    checks.one_of("task_type", getattr(task, "value", task), (None, "CAUSAL_LM"))
    for name in kwargs:
        if name not in LoraConfig.__dataclass_fields__ or name == "peft_type":
            raise TypeError(f"get_peft_model: got keyword {name!r}; allowed: its own and the fields of peft.LoraConfig")


def reuse_adapter(model: PeftModel, config: LoraConfig, targets: Targets, given: Iterable[str]) -> None:
    """Let the adapter that a model has be trained further, if a call of `get_peft_model` asks for the same one.

    Args:
        model: the model; its active adapter becomes trainable.
        config: what the call asks for.
        targets: what it trains.
        given: further fields of the configuration that the call names.

    Raises:
        ValueError: the adapter is not LoRA, or has other values.
    """
    name: Any = model.active_adapter
    own: Any = model.peft_config[name]
    remedy = "or a model without an adapter"
    if not isinstance(own, LoraConfig):
        raise ValueError(
            f"model: got one with the adapter {name!r} of type {type(own).__name__}; allowed: LoRA, {remedy}"
        )
    compared = [*_COMPARED, *(field for field in given if field not in (*_COMPARED, *_NOT_COMPARED))]
    values = {field: (getattr(own, field), getattr(config, field)) for field in compared}
    base = without_adapter(model)
    values["modules_to_save"] = (_saved(own, is_tied(base)), _saved(config, is_tied(base)))
    adapted = {path for path, module in base.named_modules() if _is_lora(module)}
    values["target_modules"] = (_ends(adapted), _ends(targets.paths)) if adapted != targets.paths else (None, None)
    differ = {field: pair for field, pair in values.items() if pair[0] != pair[1]}
    if differ:
        has, asked = (", ".join(f"{field}={pair[side]!r}" for field, pair in differ.items()) for side in (0, 1))
        raise ValueError(f"model: got one with an adapter of {has}; allowed: one of {asked}, as in this call, {remedy}")
    own.inference_mode = False
    model.set_adapter(name)
    logger.info("model: it has the adapter %r with these values already, which is trained further", name)


def widen_float16(model: nn.Module) -> None:
    """Convert trained float16 weights of a quantised model to float32; warn about them in any other model.

    Loss scaling refuses float16 gradients. Quantised layers accept inputs of any dtype, but float16 layers accept the
    output of a float32 embedding only under autocast.
    """
    base = without_adapter(model)
    quantized = any(getattr(base, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half and not quantized:
        logger.warning(
            "dtype: got trained weights in float16, which fp16=True refuses; allowed: dtype=torch.float32; %s",
            ", ".join(half),
        )
    elif half:
        logger.info("trained in float32 instead of float16, as loss scaling requires: %s", ", ".join(half))
        for name in half:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float()


def is_tied(model: Any) -> bool:
    """Whether the head and the token embedding have the same weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _saved(config: LoraConfig, tied: bool) -> list[str]:
    """The modules trained in full, by their own names; peft adds the path of an embedding that the model ties."""
    names = {name.rpartition(".")[2] for name in config.modules_to_save or ()}
    if tied and not names.isdisjoint(EMBEDDING_NAMES):
        names |= {*EMBEDDING_NAMES}
    return sorted(names)


def _is_lora(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and not hasattr(module, "parameter_name")


def _ends(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})

"""Adding an adapter to a model: its arguments, an adapter that is there already, and the dtype of what is trained."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from unsloth_fast.models import kinds
from unsloth_fast.models.beside_experts import layers_beside_experts, warn_of_layers_left
from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.layers import is_lora, last_parts
from unsloth_fast.models.protocols import CausalLM
from unsloth_fast.models.source import Source
from unsloth_fast.models.targets import EMBEDDING_NAMES, Targets
from unsloth_ref import checks

logger = logging.getLogger(__name__)

_COMPARED = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "layers_to_transform")
_NOT_COMPARED = ("init_lora_weights", "loftq_config", "ensure_weight_tying", "target_parameters", "exclude_modules")


def check_arguments(
    base: PreTrainedModel, given: Mapping[str, object], vision: bool | None, kwargs: dict[str, object]
) -> None:
    """Raise for an argument of `get_peft_model` that is not allowed; take task_type out of kwargs.

    Args:
        base: the model without its adapter.
        given: the arguments that become fields of `peft.LoraConfig`, and random_state.
        vision: finetune_vision_layers.
        kwargs: further fields of `peft.LoraConfig`.
    """
    kinds.whole("r", given["r"], 1)
    kinds.whole("random_state", given["random_state"])
    kinds.number("lora_alpha", given["lora_alpha"])
    kinds.number("lora_dropout", given["lora_dropout"])
    dropout: Any = given["lora_dropout"]
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout: got {dropout!r}; allowed: at least 0 and below 1")
    checks.one_of("bias", given["bias"], ("none", "all", "lora_only"))
    kinds.switches({name: given.get(name) for name in ("use_rslora", "use_dora", "lora_bias")})
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        kinds.names(name, given.get(name), pattern=True)
    for name in ("modules_to_save", "target_parameters"):
        kinds.names(name, given.get(name))
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, given.get(name))
    _check_layers(base, given["layers_to_transform"], given["layers_pattern"])
    _check_tokens(base, given.get("trainable_token_indices"))
    if vision:
        raise ValueError(
            f"finetune_vision_layers: got {vision!r}; allowed: False, None, as only text is trained on here"
        )
    task = kwargs.pop("task_type", None)
    checks.one_of("task_type", getattr(task, "value", task), (None, "CAUSAL_LM"))
    for name in kwargs:
        if name not in LoraConfig.__dataclass_fields__ or name == "peft_type":
            raise TypeError(f"get_peft_model: got keyword {name!r}; allowed: its own and the fields of peft.LoraConfig")


def _check_pattern(name: str, values: object) -> None:
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{name}: got {values!r}; allowed: a dictionary from names of modules to numbers")
    for module, value in (values or {}).items():
        kinds.number(f"{name}[{module!r}]", value)


def _check_layers(base: Any, layers: object, pattern: object) -> None:
    """Refuse layers that the model does not have: peft leaves them out."""
    if layers is not None:
        count = getattr(base.config.get_text_config(), "num_hidden_layers", None) if pattern is None else None
        kinds.indices("layers_to_transform", [layers] if isinstance(layers, int) else layers, count, "layers")


def _check_tokens(base: Any, tokens: object) -> None:
    """Refuse modules that the model does not have, and tokens that the embedding does not have."""
    rows, field = base.get_input_embeddings().num_embeddings, "trainable_token_indices"
    by_module = tokens.items() if isinstance(tokens, dict) else ()
    paths = {module: f".{path}" for path, module in base.named_modules()}
    for name, _ in by_module:
        if not any(path.endswith(f".{name}") for path in paths.values()):
            embedding = paths[base.get_input_embeddings()].rpartition(".")[2]
            raise ValueError(f"{field}: got the module {name!r}; allowed: modules of the model, such as {embedding!r}")
    listed = {f"{field}[{name!r}]": each for name, each in by_module} or {field: tokens or None}
    for name, each in listed.items():
        if each is not None:
            kinds.indices(name, each, rows, "tokens of the model's embedding")


def check_full_finetuning(asked: bool, source: Source) -> None:
    """Refuse an adapter where all weights are to be trained."""
    if asked and source.is_adapter:
        raise ValueError(
            f"full_finetuning: got True and model_name={source.name!r}, an adapter, whose base model stays frozen; "
            "allowed: a whole model, such as save_pretrained_merged writes"
        )


def is_fully_trained(model: nn.Module) -> bool:
    """Whether the model was loaded with full_finetuning=True, so that it gets no adapter, which is logged."""
    if isinstance(model, PeftModel) or not getattr(model, "unsloth_full_finetuning", False):
        return False
    logger.warning(
        "full_finetuning: got True in from_pretrained, so get_peft_model has no effect: all weights are trained"
    )
    return True


def adapt(
    model: PreTrainedModel | PeftModel, config: LoraConfig, targets: Targets, given: Iterable[str], seed: int
) -> nn.Module:
    """The model with a new adapter, whose weights follow from the seed, or with the same one that it has already.

    Args:
        model: the model, changed in place.
        config: what the call of `get_peft_model` asks for.
        targets: what it trains.
        given: further fields of the configuration that the call names.
        seed: of the weights; the global generators do not change.
    """
    if isinstance(model, PeftModel):
        _reuse_adapter(model, config, targets, given)
        return model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    warn_of_layers_left(adapted)
    return adapted


def _reuse_adapter(model: PeftModel, config: LoraConfig, targets: Targets, given: Iterable[str]) -> None:
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
    adapted = {path for path, module in base.named_modules() if is_lora(module)}
    asked = targets.paths - layers_beside_experts(base)
    values["target_modules"] = (last_parts(adapted), last_parts(asked)) if adapted != asked else (None, None)
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


def is_tied(model: CausalLM) -> bool:
    """Whether the head and the token embedding have the same weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _saved(config: LoraConfig, tied: bool) -> list[str]:
    """The modules trained in full, by their own names; peft adds the path of an embedding that the model ties."""
    names = {name.rpartition(".")[2] for name in config.modules_to_save or ()}
    if tied and not names.isdisjoint(EMBEDDING_NAMES):
        names |= {*EMBEDDING_NAMES}
    return sorted(names)

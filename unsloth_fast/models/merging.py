"""A plain transformers model with the adapters merged into its weights.

Each weight is merged in float32 (float64 stays float64) and rounded once. Quantised weights are dequantised once and
never quantised again. Nothing is written to the model that has the adapters: every layer is merged on a copy.
"""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unsloth_fast.models.float8 import dequantised, is_float8
from unsloth_fast.models.head import without_adapter
from unsloth_ref.accuracy import is_float

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]
"""The parameters and buffers of one module, by their names in it."""


def merged_model(model: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """A plain model whose `save_pretrained` writes what `model` computes with its active adapters.

    Only what is saved is there, on the CPU; buffers that no file holds have no memory.

    Merged are LoRA and its variants that have a merged form, such as DoRA and rsLoRA, several active adapters,
    modules_to_save, trainable tokens, and expert weights. Disabled adapters are left out.

    Args:
        model: a `transformers.PreTrainedModel`, with or without adapters, unquantised, quantised by bitsandbytes, or in
            float8; it does not change.
        dtype: of the result's floating-point weights; those that the model's class keeps in float32 stay in it.

    Returns:
        A model of the base model's class, without quantisation. Its embeddings are tied if those of `model` are tied
        and hold the same values after merging.

    Raises:
        ValueError: a weight that is sharded, offloaded or quantised otherwise; an adapter that has no merged form or
            holds NaN.
        OverflowError: a merged weight is beyond the range of `dtype`.
    """
    base = without_adapter(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("model: got one with a trained prompt, which no weight holds; allowed: save_method='lora'")
    plain = _empty_model(base, copy.deepcopy(base.config))
    with torch.no_grad():
        state = dict(_merged_state(base, plain, dtype))
    tied = _tied_names(plain)
    if any(not torch.equal(state[tied[0]], state[name]) for name in tied):
        logger.info("no longer tied, as they differ after merging: %s", ", ".join(tied))
        config = copy.deepcopy(base.config)
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        plain = _empty_model(base, config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(base.generation_config)
    return plain


def _empty_model(base: Any, config: Any) -> Any:
    """A model of the base model's class whose weights hold no memory."""
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        return type(base)(config)


def _tied_names(plain: Any) -> list[str]:
    """The names of the weight of the embedding and the head if they are the same; empty otherwise."""
    head = plain.get_output_embeddings()
    if head is None or head.weight is not plain.get_input_embeddings().weight:
        return []
    return [name for name, parameter in plain.named_parameters(remove_duplicate=False) if parameter is head.weight]


def _merged_state(base: nn.Module, plain: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The name and the merged value of each entry of the plain model's state dict."""
    names: dict[str, list[str]] = {}
    for name in plain.state_dict():
        path, _, leaf = name.rpartition(".")
        names.setdefault(path, []).append(leaf)
    kept = {*(plain._keep_in_fp32_modules or ()), *(plain._keep_in_fp32_modules_strict or ())}
    for path, leaves in names.items():
        weights = _weights(_find(base, path), leaves)
        if isinstance(plain.get_submodule(path), Conv1D) and not isinstance(_inside(_find(base, path)), Conv1D):
            weights["weight"] = weights["weight"].T.contiguous()  # bitsandbytes holds it as a linear layer's
        for leaf in leaves:
            name = f"{path}.{leaf}" if path else leaf
            yield name, _rounded(weights[leaf], name, torch.float32 if kept.intersection(name.split(".")) else dtype)


def _rounded(wide: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The value in `dtype`, on the CPU; integers are copied as they are."""
    if not wide.is_floating_point():
        return wide.detach().to("cpu", copy=True)
    narrow = wide.detach().to(dtype=dtype).to("cpu", copy=True)
    if not narrow.isfinite().all():
        if wide.isfinite().all():
            raise OverflowError(f"dtype: got {dtype} and {name} of up to {wide.abs().max():.3g}; allowed: a wider one")
        raise ValueError(f"model: got NaN or infinite values in {name} after merging; allowed: finite values")
    return narrow


def _find(base: nn.Module, path: str) -> nn.Module:
    """The module at the path that a model without adapters would have, with its adapters if it has some."""
    module = base
    for name in path.split(".") if path else ():
        module = getattr(_inside(module), name)
    return module


def _inside(module: nn.Module) -> nn.Module:
    """The module under the wrappers of peft, if it has some; of a module trained in full, the trained copy."""
    while True:
        if isinstance(module, ModulesToSaveWrapper):
            module = _active_copy(module)
        elif isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        elif isinstance(module, BaseTunerLayer):
            return module.get_base_layer()
        else:
            return module


def _active_copy(wrapper: Any) -> nn.Module:
    names = [] if wrapper.disable_adapters else [n for n in wrapper.active_adapters if n in wrapper.modules_to_save]
    return wrapper.modules_to_save[names[0]] if names else wrapper.original_module


def _weights(module: nn.Module, names: list[str]) -> Weights:
    """The weights of these names with which the module computes, merged; unrounded."""
    while isinstance(module, ModulesToSaveWrapper | TrainableTokensWrapper):
        module = _active_copy(module) if isinstance(module, ModulesToSaveWrapper) else module.token_adapter
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weights = {name: _dequantised(base, name) for name in names}
    return _with_adapters(module, base, weights) if isinstance(module, BaseTunerLayer) else weights


def _dequantised(module: Any, name: str) -> Tensor:
    """A weight of a module without adapters, in float32 or float64 where it is a floating-point one."""
    weight = getattr(module, name)
    kind = type(weight).__name__
    if isinstance(weight, DTensor) or weight.device.type == "meta":
        where = "sharded" if isinstance(weight, DTensor) else "offloaded"
        raise ValueError(f"model: got a weight {name!r} that is {where}; allowed: all weights in one process's memory")
    if kind == "Params4bit" and weight.quant_state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scale = module.state.SCB if weight.SCB is None else weight.SCB
        weight = int8_vectorwise_dequant(weight.data, scale.to(weight.device))
    elif name == "weight" and is_float8(module):
        weight = dequantised(module)
    elif name == "weight" and not is_float(weight):
        raise ValueError(
            f"model: got {type(module).__name__} with weights in {weight.dtype}; allowed: weights that are not "
            "quantised, or by bitsandbytes, or to float8 in blocks of 128 x 128"
        )
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) if weight.is_floating_point() else weight


def _with_adapters(layer: Any, base: nn.Module, weights: Weights) -> Weights:
    """The weights of a layer with its active adapters, merged by peft.

    peft merges in place and rounds to the dtype of the weights. So it merges a copy that is as wide as the weights.
    """
    widest = torch.float32
    replaced = {}
    for name, weight in weights.items():
        widest = torch.promote_types(widest, weight.dtype)
        replaced[id(getattr(base, name))] = nn.Parameter(weight, requires_grad=False)
    wide = copy.deepcopy(layer, replaced).to(widest)
    if type(layer).__module__.endswith(".bnb"):
        if not isinstance(layer, LoraLayer):
            raise ValueError(
                f"model: got {type(layer).__module__}.{type(layer).__name__}; allowed: LoRA, or a model that is not "
                "quantised"
            )
        wide.__class__ = Linear  # that of a quantised layer would quantise the merged weight
    inner, merged = wide, wide.get_base_layer()
    while inner is not merged:  # each parameter of experts has a wrapper of its own, one inside another
        _merge(inner)
        inner = inner.base_layer
    return {name: getattr(merged, name).detach() for name in weights}


def _merge(layer: Any) -> None:
    """Merge a layer's active adapters into it, unless they are disabled or merged already."""
    if layer.disable_adapters or layer.merged:
        return
    known = layer.trainable_tokens_delta if isinstance(layer, TrainableTokensLayer) else layer.active_adapters
    names = [name for name in layer.active_adapters if name in known]
    try:
        if names:
            layer.merge(safe_merge=True, adapter_names=names)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"model: got the adapter {', '.join(names)}, which cannot be merged ({error or 'it has no merged form'}); "
            "allowed: save_method='lora'"
        ) from error

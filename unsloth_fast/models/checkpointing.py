"""Gradient checkpointing whose saved layer inputs wait in host memory for the backward pass.

transformers decides which layers are checkpointed and how. This module adds hooks around each checkpointed call, which
torch applies to the inputs that it saves to recompute the layer. The copy to the host runs on a stream of its own,
beside the layer; the copy back runs before the layer is recomputed.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainingArguments

from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.methods import replace_method, restore_method
from unsloth_fast.models.protocols import CausalLM

logger = logging.getLogger(__name__)

Packed = tuple[Tensor, Any, torch.device] | Tensor  # host copy, event after the copy, device of the original

_SETTER = "_set_gradient_checkpointing"


def enable_checkpointing(model: CausalLM, enable: bool) -> None:
    """Turn a model's gradient checkpointing on or off."""
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its name since 5.2x
    if enable:
        getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    elif getattr(model, f"is_{word}_checkpointing"):
        getattr(model, f"{word}_checkpointing_disable")()


def is_usual(model: object) -> bool:
    """Whether to checkpoint where nobody chose: as TRL does, unless transformers cannot, which is logged."""
    inner: Any = without_adapter(model)
    if isinstance(inner, str):
        return True
    marked = any(hasattr(module, "gradient_checkpointing") for module in inner.modules())
    if not (inner.supports_gradient_checkpointing and marked):
        logger.warning("gradient_checkpointing: off, because a %s has no support for it", type(inner).__name__)
        return False
    return True


def follow_arguments(model: object, args: TrainingArguments) -> None:
    """Turn off the gradient checkpointing that a model was loaded with unless the run's arguments ask for it.

    Args:
        model: the model, with or without an adapter, or its name or path.
        args: the run's arguments.
    """
    if getattr(model, "unsloth_gradient_checkpointing", False) and not args.gradient_checkpointing:
        enable_checkpointing(without_adapter(model), False)


def enable_offloading(model: CausalLM) -> None:
    """Let the model's gradient checkpointing, whenever it is enabled, keep the layers' inputs in pinned host memory.

    Gradients are the same to the bit. On a CPU nothing is copied.

    Args:
        model: a `transformers.PreTrainedModel`; changed in place, `disable_offloading` is the inverse.
    """
    replace_method(model, _SETTER, _set_gradient_checkpointing, "offloading")


def disable_offloading(model: CausalLM) -> None:
    """Undo `enable_offloading`; takes effect when gradient checkpointing is enabled next."""
    restore_method(model, _SETTER, "offloading")


def offloads(function: object) -> bool:
    """Whether a layer's checkpointing function keeps the layer's inputs in host memory."""
    return isinstance(function, partial) and function.func is _with_inputs_on_host


def is_reentrant(function: object) -> bool:
    """Whether a layer's checkpointing function runs the layer without gradients before it recomputes it."""
    inner = function.args[0] if isinstance(function, partial) and offloads(function) else function
    return isinstance(inner, partial) and bool(inner.keywords.get("use_reentrant"))


def _set_gradient_checkpointing(self: Any, enable: bool = True, **options: Any) -> None:
    if enable:
        function = options["gradient_checkpointing_func"]
        options["gradient_checkpointing_func"] = partial(_with_inputs_on_host, function)
    getattr(type(self), _SETTER)(self, enable=enable, **options)


def _with_inputs_on_host(checkpoint: Callable[..., object], function: Callable[..., object], *args: object) -> object:
    with saved_tensors_hooks(to_host, from_host):
        return checkpoint(function, *args)


def to_host(tensor: Tensor) -> Packed:
    """Start copying a CUDA tensor to pinned host memory; return any other tensor as it is."""
    if not tensor.is_cuda:
        return tensor.detach()  # what keeps its own result itself would never be freed
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory is not reused before the copy is complete
    return host, stream.record_event(), tensor.device


def from_host(packed: Packed) -> Tensor:
    """The inverse of `to_host`: the tensor on its device."""
    if isinstance(packed, Tensor):
        return packed
    host, copied, device = packed
    torch.cuda.current_stream(device).wait_event(copied)
    return host.to(device, non_blocking=True)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

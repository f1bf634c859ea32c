"""Gradient checkpointing with the layers' inputs kept in the host's memory until the backward pass.

transformers decides which layers are checkpointed and how; what is added here are hooks around each checkpointed call,
which torch applies to the inputs that it keeps for recomputing the layer. A copy to the host runs on a stream of its
own beside the layer; the copy back runs in front of the layer's recomputation.
"""

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from unsloth_fast.models.head import without_adapter

Packed = tuple[Tensor, Any, torch.device] | Tensor  # in the middle the event after the copy


def enable_checkpointing(model: Any, enable: bool) -> None:
    """Turn a model's gradient checkpointing on or off."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its name since 5.2x
    if enable:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    elif getattr(model, f"is_{kind}_checkpointing"):
        getattr(model, f"{kind}_checkpointing_disable")()


def follow_arguments(model: Any, args: Any) -> None:
    """Turn off the gradient checkpointing that a model was loaded with where a run's arguments do not want it.

    Args:
        model: the model, with an adapter or without, or the name or path of one.
        args: `transformers.TrainingArguments`.
    """
    if getattr(model, "unsloth_gradient_checkpointing", False) and not args.gradient_checkpointing:
        enable_checkpointing(without_adapter(model), False)


def offload(model: Any) -> None:
    """Make the model's gradient checkpointing, whenever it is enabled, keep the layers' inputs in pinned host memory.

    Gradients are the same to the bit. On a CPU nothing is copied.

    Args:
        model: a `transformers.PreTrainedModel`; changed in place, `keep` undoes it.
    """
    model._set_gradient_checkpointing = MethodType(_set_offloaded_checkpointing, model)


def keep(model: Any) -> None:
    """Undo `offload`; takes effect when gradient checkpointing is enabled next."""
    vars(model).pop("_set_gradient_checkpointing", None)


def _set_offloaded_checkpointing(self: Any, enable: bool = True, **options: Any) -> None:
    if enable:
        options["gradient_checkpointing_func"] = _offloading(options["gradient_checkpointing_func"])
    type(self)._set_gradient_checkpointing(self, enable=enable, **options)


def _offloading(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def checkpoint_with_inputs_on_host(function: Callable[..., Any], *args: Any) -> Any:
        with saved_tensors_hooks(to_host, from_host):
            return checkpoint(function, *args)

    return checkpoint_with_inputs_on_host


def to_host(tensor: Tensor) -> Packed:
    """Start the copy of a CUDA tensor to pinned host memory; any other tensor is returned as it is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory is not given away before the copy is done
    return host, stream.record_event(), tensor.device


def from_host(packed: Packed) -> Tensor:
    """The tensor that `to_host` took, on its device again."""
    if isinstance(packed, Tensor):
        return packed
    host, copied, device = packed
    torch.cuda.current_stream(device).wait_event(copied)
    return host.to(device, non_blocking=True)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

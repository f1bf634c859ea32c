"""May a stack of layers be recorded as CUDA graphs, and is it still the one that was recorded?

A replay repeats what was launched, not the Python between the launches. So the stack is compared with what it was, in
all attributes of all modules, and what these hold: mode, hooks, forwards, adapters and their scalings, weights,
whatever a class of your own has; and in what is global, such as the precision. It costs 1 ms for a Llama of 16 layers
with LoRA, which has 1337 modules. A layer that leaves something behind in each forward pass, as a counter, a running
mean or a loss, changes the stack each time, so that it is never recorded.
"""

from collections.abc import Callable, Sequence
from functools import partial
from logging import Logger
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from unsloth_fast.failures import FAILURES
from unsloth_fast.models.methods import hooks_of
from unsloth_fast.models.packed import Documents, documents_of

CHECKPOINT = "_gradient_checkpointing_func"  # of a checkpointed layer: what it calls to run
# Modules are listed by themselves; the others change in each pass, or are code.
_OPAQUE = (Module, Tensor, Documents, Logger, type, ModuleType, FunctionType, MethodType, partial)
_RANDOM = ("drop", "jitter")  # in the names of a configuration's fields that are shares


class Snapshot:
    """What the recordings of a stack depend on besides the batch.

    Attributes:
        modules: the stack, and all below it.
        parameters: theirs.

    Args:
        stack: one of `stacks_of`.
        device: the type of device that records.
    """

    def __init__(self, stack: PreTrainedModel, device: str) -> None:
        self.modules, self.parameters = list(stack.modules()), list(stack.parameters())
        self._stack, self._device = stack, device
        self._held, self._tensors = _held_by(self.modules, vars(stack.config))
        self._before = list(map(_copied, self._held))
        self._state_before = self._state()

    def is_current(self) -> bool:
        """Whether all is as it was."""
        try:
            same = self._held == self._before
        except FAILURES:  # of two tensors or arrays, which are not equal as a whole
            return False
        # Two tensors of one number are equal, too.
        same = same and all(held[name] is tensor for held, name, tensor in self._tensors)
        return same and self._state() == self._state_before

    def obstacle(self) -> str | None:
        """Why the stack cannot be recorded; None if it can."""
        documents = documents_of(self._stack)
        if documents is None or documents.masked is not None:
            return "documents are kept apart by a mask"
        reason = self._obstacle_of_weights() or next(filter(None, map(_obstacle_of_module, self.modules)), None)
        if reason is not None:
            return reason
        config = self._stack.config
        shares = {name: value for name, value in vars(config).items() if any(word in name for word in _RANDOM)}
        random = [name for name, value in shares.items() if isinstance(value, float) and value > 0]
        return f"{random[0]}={shares[random[0]]} in the model's configuration" if random else None

    def _obstacle_of_weights(self) -> str | None:
        if any(isinstance(one, DTensor) for one in self.parameters):
            return "the weights are sharded"
        if any(one._backward_hooks for one in self.parameters):  # recorded, they would run twice in each replay
            return "a hook of a weight"
        wrapped = next((one for one in self.parameters if hasattr(one, "__tensor_flatten__") or not one.is_leaf), None)
        if wrapped is not None:  # what it is made of may change
            return f"a weight is a {type(wrapped).__name__}"
        places = {one.device for one in self.parameters}
        if places != {torch.empty(0, device=self._device).device}:
            return f"the weights are on {', '.join(map(str, places))}"
        return None

    def _state(self) -> tuple[object, ...]:
        """What may change without an attribute of a module: memory, values that nobody trains, what is global."""
        tensors = [tensor for _, _, tensor in self._tensors]
        places = [(_address(one), one.dtype, one.stride()) for one in tensors]
        trained = [(one.requires_grad, bool(one._backward_hooks)) for one in self.parameters]
        values = [one.requires_grad or one.is_inference() or one._version for one in tensors]
        config = {**vars(self._stack.config), "use_cache": False}  # recorded without a cache
        return places, trained, values, config, list(map(type, self.modules)), _global_state(self._device)


def _address(tensor: Tensor) -> int:
    """Where its memory begins; 0 for a subclass, which has none of its own."""
    return 0 if hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr()


def _global_state(device: str) -> tuple[object, ...]:
    return (
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.empty(0, device=device).device,
    )


Held = dict[Any, Any] | list[Any] | set[Any] | MappingProxyType[str, Any]


def _held_by(modules: Sequence[Module], config: dict[str, Any]) -> tuple[list[Held], list[tuple[Any, Any, Tensor]]]:
    """What modules hold that may change in place: dictionaries, lists, sets, and attributes of objects and classes.

    Args:
        modules: the modules.
        config: attributes that may change, but not what they hold.

    Returns:
        All of them, and each tensor in them: what holds it, its name or index there, and itself.
    """
    found, tensors, seen = list[Held](), list[tuple[Any, Any, Tensor]](), {id(config)}
    waiting: list[Any] = [*map(vars, modules), *config.values()]
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, dict | list | set):
            found.append(held)
        if isinstance(held, dict | list):
            named = held.items() if isinstance(held, dict) else enumerate(held)
            tensors += [(held, name, value) for name, value in named if isinstance(value, Tensor)]
        if isinstance(held, dict | list | set | tuple):
            waiting += held.values() if isinstance(held, dict) else held
        elif hasattr(held, "__dict__") and not isinstance(held, _OPAQUE):
            waiting.append(vars(held))
    return [*found, *map(vars, {base for module in modules for base in type(module).__mro__})], tensors


def _copied(held: Held) -> Held:
    return dict(held) if isinstance(held, dict | MappingProxyType) else held.copy()


def _obstacle_of_module(module: Module) -> str | None:
    if hasattr(module, "_hf_hook") or not all(map(_is_known, hooks_of(module))):
        return f"a hook of a {type(module).__name__}"
    return "dropout" if "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0 else None


def _is_known(hook: Callable[..., object]) -> bool:
    """Whether a hook is transformers' or peft's on the embedding of a checkpointed model, which lets it have gradients.

    Or one of transformers' that collects what the stack returns, such as router logits.
    """
    collects = getattr(hook, "__module__", "") == output_capturing.__name__
    return collects or getattr(hook, "__name__", "").startswith("make_inputs_require_grad")

"""May a stack of layers be recorded as CUDA graphs, and is it still the one that was recorded?

A replay repeats what was launched, not the Python between the launches. So the stack is compared with what it was, in
all attributes of all modules: mode, hooks, forwards, adapters and their scalings, weights, whatever a class of your own
has. It costs 1 ms for a Llama of 16 layers with LoRA, which has 1337 modules. A layer that leaves something behind in
each forward pass, as a counter, a running mean or a loss, changes the stack each time, so that it is never recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Module
from transformers import PreTrainedModel

from unsloth_fast.models.methods import hooks_of
from unsloth_fast.models.packed import documents_of

CHECKPOINT = "_gradient_checkpointing_func"  # of a checkpointed layer: what it calls to run
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
        self._stack, self._device, self._buffers = stack, device, list(stack.buffers())
        self._attributes = list(map(vars, self.modules))
        self._before, self._state_before = list(map(_copied, self._attributes)), self._state()

    def is_current(self) -> bool:
        """Whether all is as it was."""
        try:
            same = self._attributes == self._before
        except (RuntimeError, TypeError, ValueError):  # of two tensors or arrays, which are not equal as a whole
            return False
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
        if random:
            return f"{random[0]}={shares[random[0]]} in the model's configuration"
        return "router logits are asked for" if getattr(config, "output_router_logits", False) else None

    def _obstacle_of_weights(self) -> str | None:
        if any(isinstance(one, DTensor) for one in self.parameters):
            return "the weights are sharded"
        if any(one._backward_hooks for one in self.parameters):  # recorded, they would run twice in each replay
            return "a hook of a weight"
        places = {one.device for one in self.parameters}
        if len(places) != 1 or next(iter(places)).type != self._device:
            return f"the weights are on {', '.join(map(str, places))}"
        return None

    def _state(self) -> tuple[object, ...]:
        """What may change without another attribute of a module; a forward pass may change a buffer in place."""
        precision = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        places = [(one.data_ptr(), one.requires_grad, bool(one._backward_hooks)) for one in self.parameters]
        buffers = [(one.data_ptr(), one.is_inference() or one._version) for one in self._buffers]
        return precision, places, buffers, {**vars(self._stack.config), "use_cache": False}  # recorded without a cache


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, with what their dictionaries, lists and sets hold now."""
    return {name: value.copy() if isinstance(value, dict | list | set) else value for name, value in attributes.items()}


def _obstacle_of_module(module: Module) -> str | None:
    if hasattr(module, "_hf_hook") or not all(map(_asks_for_gradients, hooks_of(module))):
        return f"a hook of a {type(module).__name__}"
    return "dropout" if "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0 else None


def _asks_for_gradients(hook: Callable[..., object]) -> bool:
    """Whether a hook is transformers' or peft's on the embedding of a checkpointed model, which does nothing else."""
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")

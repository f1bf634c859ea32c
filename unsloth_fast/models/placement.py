"""Placing a backend's operations under a model: each module that they compute gets another forward.

Classes, parameters and state-dict names do not change (see `unsloth_fast.models.methods`).
"""

import logging
from collections import Counter
from collections.abc import Hashable
from typing import Any, cast

from torch.nn import Module

from unsloth_fast.backends import Backend
from unsloth_fast.models.attention import attention_placement, packing_refusal, stack_forward
from unsloth_fast.models.families import family_and_part, family_of
from unsloth_fast.models.lora import lora_placement
from unsloth_fast.models.methods import has_own_method, replace_method, restore_method
from unsloth_fast.models.mlp import Gated, mlp_forward
from unsloth_fast.models.norm import Norm, norm_forward
from unsloth_fast.models.protocols import Attention, Placement
from unsloth_fast.models.structure import Found, recognise

logger = logging.getLogger(__name__)

_LOGGED = "unsloth_placed"  # the attribute of a model with what was logged of it


def place(model: Module, backend: Backend) -> dict[str, int]:
    """Give every module that the backend's operations compute a forward that calls them, and log which.

    Those are, in any model, also under peft's wrappers:

    - the RMSNorms, and the MLPs whose gate is SiLU or GELU, with separate or fused projections, recognised by a numeric
      check (see `unsloth_fast.models.structure`);
    - peft's linear layers with LoRA, in full precision or 4 bits (see `unsloth_fast.models.lora`);

    and in Llama, Mistral, Qwen2, Qwen3 and Gemma 1 to 3 the attention: rope, and packed_attention for packed batches
    (see `unsloth_fast.models.attention`). All other batches are left to the model's attn_implementation; so are packed
    ones if the attention has dropout or its implementation is neither sdpa nor eager.

    All other modules keep their forward, and so does a module whose forward somebody else has replaced. The log names
    those that look like a norm, an MLP or an attention, each class once per model, with what the check found.
    Placing again replaces what was placed; `remove` is the inverse.

    Args:
        model: the model, changed in place; its parameters, their names and its config do not change.
        backend: the result of `unsloth_fast.backends.resolve`.

    Returns:
        How many modules call each operation, such as {"rope": 16, "packed_attention": 16, "swiglu": 16,
        "rms_norm": 33}.
    """
    _restore_forwards(model)
    placed: Counter[str] = Counter()
    unchanged: Counter[str] = Counter()
    known: dict[Hashable, Found] = {}
    for module in model.modules():
        name = type(module).__name__
        placement = None if has_own_method(module, "forward") else _placement_for(module, backend, known)
        if isinstance(placement, str):
            unchanged[f"{name} ({placement})"] += 1
        elif placement is not None:
            operations, forward = placement
            replace_method(module, "forward", forward, "operation")
            placed.update(operations)
            if family_of(module, "attention") and "packed_attention" not in operations:
                unchanged[f"packed {name} ({packing_refusal(cast(Attention, module))})"] += 1
        elif name.endswith(("Norm", "MLP", "Attention")):
            unchanged[name] += 1
    _log(model, f"backend {backend.name}: operations placed: {dict(placed)}", unchanged)
    return dict(placed)


def remove(model: Module) -> None:
    """Undo `place`: give every module that it changed its own forward back."""
    _restore_forwards(model)
    for module in model.modules():
        vars(module).pop(_LOGGED, None)


def _restore_forwards(model: Module) -> None:
    for module in model.modules():
        restore_method(module, "forward", "operation")


def _placement_for(module: Any, backend: Backend, known: dict[Hashable, Found]) -> Placement | str | None:
    """The operations and the forward for a module; why there are none for one that seemed to have some."""
    family, part = family_and_part(module)
    if family is not None and part == "attention":
        return attention_placement(module, family, backend)
    if part == "stack":
        forward = stack_forward(module)
        return None if forward is None else ((), forward)
    found = recognise(module, known)
    if isinstance(found, Norm):
        return ("rms_norm",), norm_forward(found, backend.kernels.rms_norm)
    if isinstance(found, Gated):
        return (found.operation,), mlp_forward(found, backend.kernels)
    return lora_placement(module, backend) if found is None else found


def _log(model: Any, placed: str, unchanged: Counter[str]) -> None:
    """Log what was placed, unless it is the same as last time, and unchanged classes that are not logged yet."""
    last, named = getattr(model, _LOGGED, ("", frozenset()))  # a peft model also has its base model's
    new = {name: count for name, count in unchanged.items() if name not in named}
    if new or placed != last:
        logger.info(f"{placed}; modules left unchanged: {new}" if new else placed)
    setattr(model, _LOGGED, (placed, named | new.keys()))

"""Placing a backend's operations under a model: each module that they compute gets another forward.

Classes, parameters and state-dict names do not change (see `unsloth_fast.models.methods`).
"""

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch.nn import LayerNorm as LayerNormOfTorch
from torch.nn import Module

from unsloth_fast.backends import Backend
from unsloth_fast.models.attention import attention_placement, shared_placement
from unsloth_fast.models.experts import Experts, experts_forward, inside_of
from unsloth_fast.models.float8 import float8_placement
from unsloth_fast.models.head_norms import norms_inside
from unsloth_fast.models.interface import stacks_of
from unsloth_fast.models.lora import lora_placement
from unsloth_fast.models.methods import has_foreign_forward, has_own_method, replace_method, restore_method
from unsloth_fast.models.mixers import Mixer, mixer_forward, recognise_mixer
from unsloth_fast.models.mlp import Gated, mlp_placement
from unsloth_fast.models.norm import GatedNorm, LayerNorm, Norm, gated_norm_forward, layer_norm_forward, norm_forward
from unsloth_fast.models.outer_masks import place_outer_masks
from unsloth_fast.models.packed import place_documents, remove_documents
from unsloth_fast.models.projections import shared_layers
from unsloth_fast.models.protocols import Placement
from unsloth_fast.models.quantization import log_experts
from unsloth_fast.models.scaled_experts import (
    ScaledExperts,
    experts_inside,
    recognise_scaled_experts,
    scaled_experts_forward,
)
from unsloth_fast.models.structure import recognise

logger = logging.getLogger(__name__)

_NAMED = ("Norm", "MLP", "Attention", "Experts")  # how the names of classes end that are logged if nothing is placed
_LOGGED = "unsloth_placed"  # the attribute of a model with what was logged of it


def place(model: Module, backend: Backend, *, documents: bool = True) -> dict[str, int]:
    """Give every module that the backend's operations compute a forward that calls them, and log which.

    Those are, in any model, also under peft's wrappers:

    - the RMSNorms, with a weight, a gate or neither, the layer norms without a bias, and the MLPs whose gate is SiLU or
      GELU, with separate or fused projections, or whose activation is the square of ReLU, recognised by a numeric check
      (see `unsloth_fast.models.structure`);
    - the experts of transformers' models whose gate is SiLU, also clamped, or GELU, with biases or not, recognised in
      the same way, and peft's adapters of their weights (see `unsloth_fast.models.experts`); those of Llama 4 too,
      whose inputs are scaled (see `unsloth_fast.models.scaled_experts`);
    - the short convolutions, gated delta rules and scans of Qwen3-Next, Qwen3.5, LFM2 and the hybrids with Mamba 2,
      recognised in the same way (see `unsloth_fast.models.mixers`);
    - peft's linear layers with LoRA, in full precision, float8 or 4 bits (see `unsloth_fast.models.lora`); an MLP all
      of whose layers have it is one operation, lora_mlp, and so are several that a module calls with the same tensor,
      as an attention its projections: lora_linears (see `unsloth_fast.models.projections`);
    - linear layers in float8 (see `unsloth_fast.models.float8`);
    - packed_attention for packed batches, in every model of transformers whose attention goes through its interface:
      the model's attn_implementation sdpa or eager becomes packed_sdpa or packed_eager, which do the same for all other
      batches (see `unsloth_fast.models.packed`). With dropout, or anything else that packed_attention does not compute,
      it becomes masked_sdpa or masked_eager, and documents are kept apart by a mask, with a warning;
    - rope in every attention that rotates by a function of its file which computes the same, half by half or
      interleaved, queries and keys together or one by one, by real or complex numbers (see
      `unsloth_fast.models.attention`); where norms of the heads stand directly before it, as in Qwen3, Gemma 3 and
      Gemma 4, qk_norm_rope computes both.

    A fused operation, qk_norm_rope, fused_swiglu, lora_mlp or lora_linears, is placed if it and its parts come from the
    same package. A backend with a setting for one of them, such as "fast,rope=reference", separates it.

    All other modules keep their forward, and so does a module whose forward somebody else has replaced. The log names
    those that look like a norm, an MLP, experts or an attention, each class once per model, with the reason.
    Placing again replaces what was placed; `remove` is the inverse.

    Args:
        model: the model, changed in place; its parameters and their names do not change, and saved files neither.
        backend: the result of `unsloth_fast.backends.resolve`.
        documents: whether packed batches are for packed_attention; False leaves the attn_implementation as it is.

    Returns:
        How many modules call each operation, such as {"rope": 16, "packed_attention": 16, "swiglu": 16,
        "rms_norm": 33}.
    """
    operations, unchanged = _place(model, backend, documents)
    _log(model, f"backend {backend.name}: operations placed: {operations}", unchanged)
    return operations


@contextmanager
def placed(model: Module, backend: Backend) -> Iterator[None]:
    """Within the context operations are placed, which is not logged; those of an earlier `place` stay as they are."""
    if getattr(model, _LOGGED, None) is not None:
        yield
        return
    _place(model, backend, documents=True)
    try:
        yield
    finally:
        remove(model)


def _place(model: Module, backend: Backend, documents: bool) -> tuple[dict[str, int], Counter[str]]:
    """Place operations; return how many modules call each, and the modules that call none, with the reason."""
    _restore_forwards(model)
    placed: Counter[str] = Counter()
    left: list[tuple[Module, str | None]] = []  # modules without an operation, and why if the checks found out
    operated: dict[int, Sequence[str]] = {}
    packed = _place_stacks(model, backend) if documents else {}
    attends = {key for key, reason in packed.items() if reason is None}
    known: dict[Hashable, Any] = {}
    inside: set[int] = set()  # modules that the operation of a larger one computes
    for module in model.modules():
        name = type(module).__name__
        placement = None if has_own_method(module, "forward") else _placement_for(module, backend, known)
        if isinstance(placement, str):
            left.append((module, placement))
        elif placement is not None:
            operations, forward = placement
            replace_method(module, "forward", forward, "operation")
            operated[id(module)] = operations
            placed.update(() if id(module) in inside else operations)
            inside |= set(map(id, _parts(module, operations, backend)))
        elif name.endswith(_NAMED) and id(module) not in inside | attends:
            left.append((module, None))
        if id(module) in attends:
            placed["packed_attention"] += 1
    unchanged = Counter(f"{type(module).__name__} ({why or _why_left(module, operated)})" for module, why in left)
    unchanged.update(
        f"packed {type(module).__name__} ({packed[id(module)]})" for module in model.modules() if packed.get(id(module))
    )
    return dict(placed), unchanged


def remove(model: Module) -> None:
    """Undo `place`: give every module that it changed its own forward back, and the model its attn_implementation."""
    _restore_forwards(model)
    for module in model.modules():
        vars(module).pop(_LOGGED, None)


def _restore_forwards(model: Module) -> None:
    remove_documents(model)
    for module in model.modules():
        restore_method(module, "forward", "operation")


def _parts(module: Module, operations: Sequence[str], backend: Backend) -> Iterable[Module | None]:
    """The modules inside of this one that its operations compute: norms of heads, layers with LoRA, or experts."""
    if "lora_mlp" in operations:
        return module._modules.values()
    norms = norms_inside(module) if "qk_norm_rope" in operations else ()
    layers = shared_layers(module, backend) if "lora_linears" in operations else ()
    return [*norms, *(module.get_submodule(layer.name) for layer in layers), *experts_inside(module)]


def _place_stacks(model: Module, backend: Backend) -> dict[int, str | None]:
    """Let each stack of layers take packed documents, as far as its attention can; before any forward is replaced.

    Returns:
        Why packed batches are not for `packed_attention`, or None, by the id of each attention of transformers'
        interface.
    """
    reasons: dict[int, str | None] = {}
    for stack in list(stacks_of(model)):
        if has_own_method(stack, "forward"):
            continue
        found, forward = place_documents(stack, backend.kernels.packed_attention)
        if forward is not None:
            replace_method(stack, "forward", forward, "operation")
        reasons |= {id(attention): found.foreign or found.masked for attention in found.attentions}
    for outer, forward in list(place_outer_masks(model)):
        if not has_own_method(outer, "forward"):
            replace_method(outer, "forward", forward, "operation")
    return reasons


def _placement_for(module: Any, backend: Backend, known: dict[Hashable, Any]) -> Placement | str | None:
    """The operations and the forward for a module; why there are none for one that seemed to have some."""
    placement = attention_placement(module, backend, known) or float8_placement(module, backend)
    if placement is not None:
        return placement
    if isinstance(module, ParamWrapper):
        if any(map(has_foreign_forward, inside_of(module))):
            return "a forward of somebody else's inside"
        adapted = recognise(module.get_base_layer(), known)
        return (("grouped_gemm",), experts_forward(adapted, backend.kernels)) if isinstance(adapted, Experts) else None
    mixer = recognise_mixer(module, known)
    if isinstance(mixer, Mixer):
        return mixer.operations, mixer_forward(mixer, backend.kernels)
    found = mixer or recognise_scaled_experts(module, known) or recognise(module, known)
    if isinstance(found, ScaledExperts):
        return found.operations(module), scaled_experts_forward(found, backend.kernels)
    if isinstance(found, Experts):
        return ("moe_mlp",), experts_forward(found, backend.kernels)
    if isinstance(found, Norm):
        return ("rms_norm",), norm_forward(found, backend.kernels.rms_norm)
    if isinstance(found, LayerNorm):
        return ("layer_norm",), layer_norm_forward(found, backend.kernels.layer_norm)
    if isinstance(found, GatedNorm):
        return ("gated_rms_norm",), gated_norm_forward(found, backend.kernels.gated_rms_norm)
    if isinstance(found, Gated):
        return mlp_placement(module, found, backend)
    if found is not None:
        return found
    return lora_placement(module, backend) or shared_placement(module, backend)


def _why_left(module: Module, operated: Mapping[int, Sequence[str]]) -> str:
    """Why a module that looks like one of those that get an operation has none, where no numeric check was made."""
    if has_own_method(module, "forward"):
        return "its forward is somebody else's"
    if isinstance(module, LayerNormOfTorch) and module.bias is not None:
        return "it has a bias; torch's operator is one kernel already"
    inside = dict.fromkeys(name for part in module.modules() for name in operated.get(id(part), ()))
    return f"no operation computes it as a whole; inside: {', '.join(inside)}" if inside else "no operation computes it"


def _log(model: Any, placed: str, unchanged: Counter[str]) -> None:
    """Log what was placed, unless it is the same as last time, and unchanged classes that are not logged yet.

    Once for each model, log experts that quantisation leaves out.
    """
    last, named = getattr(model, _LOGGED, ("", frozenset()))  # a peft model also has its base model's
    new = {name: count for name, count in unchanged.items() if name not in named}
    if new or placed != last:
        logger.info(f"{placed}; modules left unchanged: {new}" if new else placed)
    if not last:
        log_experts(model)
    setattr(model, _LOGGED, (placed, named | new.keys()))

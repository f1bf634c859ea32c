"""One table of module kinds, and the replacement of `forward` on single module instances.

Classes stay untouched, and with them other models of the process; parameters stay where they are, and with them
state-dict names. The new forward is a bound method: copy.deepcopy binds it to the copy, while a closure would keep the
old module.
"""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn import Module

from unsloth_fast.backends import Backend
from unsloth_fast.models import attention, lora
from unsloth_fast.models.attention import Forward
from unsloth_fast.models.remade import remade, remakeable
from unsloth_ref.types import Casting

logger = logging.getLogger(__name__)


def _norm_forward(rms_norm: Callable[..., Tensor], eps_name: str, offset: float, casting: Casting) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        norm = partial(rms_norm, eps=getattr(self, eps_name), offset=offset, casting=casting)
        normed = norm(hidden_states, self.weight)
        return remakeable(normed, partial(norm, hidden_states.detach(), self.weight.detach()))

    return forward


def _gated_forward(gated: Callable[..., Tensor], **options: Any) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        with remade(hidden_states):
            gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        # The widest activation of a layer: a quarter of what training would keep of it.
        hidden = remakeable(gated(gate, up, **options), partial(gated, gate.detach(), up.detach(), **options))
        with remade(hidden):
            return self.down_proj(hidden)

    return forward


# Where the class keeps eps, what it adds to the weight, and how it rounds.
_LLAMA_NORM = ("variance_epsilon", 0.0, "llama")
_GEMMA_NORM = ("eps", 1.0, "gemma")
_NORMS: dict[str, tuple[str, float, Casting]] = {
    "LlamaRMSNorm": _LLAMA_NORM,
    "MistralRMSNorm": _LLAMA_NORM,
    "Qwen2RMSNorm": _LLAMA_NORM,
    "Qwen3RMSNorm": _LLAMA_NORM,
    "GemmaRMSNorm": _GEMMA_NORM,
    "Gemma2RMSNorm": _GEMMA_NORM,
    "Gemma3RMSNorm": _GEMMA_NORM,
}
_GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP")
# How an activation's class is gated: the operation and its options.
_GATES: dict[str, tuple[str, dict[str, str]]] = {
    "SiLU": ("swiglu", {}),
    "SiLUActivation": ("swiglu", {}),
    "GELUActivation": ("geglu", {"approximate": "none"}),
    "GELUTanh": ("geglu", {"approximate": "tanh"}),
}


def place(model: Module, backend: Backend) -> dict[str, int]:
    """Give every module of a known kind a forward that calls the backend's operations; log what was done.

    Known kinds are the RMSNorm and the attention of Llama, Mistral, Qwen2, Qwen3 and Gemma 1 to 3, and their MLP where
    it gates with SiLU or GELU, under peft's wrappers too; and peft's linear layers with LoRA, plain or of 4 bits (see
    `unsloth_fast.models.lora`). An attention takes rope and, for packed batches (see
    `unsloth_fast.models.attention`), packed_attention; all other batches are left to the model's attn_implementation,
    and so are packed ones where there is dropout on the attention or where another implementation than sdpa or eager
    was chosen. All other modules keep their forward, and so does one whose forward somebody else has replaced; those
    that look like a norm, an MLP or an attention are named in the log, each kind once a model. Placing again replaces
    what was placed.

    Args:
        model: the model; changed in place, its parameters, their names and its config not.
        backend: of `unsloth_fast.backends.resolve`.

    Returns:
        How many modules each operation was placed under, as {"rms_norm": 33, "swiglu": 16, "rope": 16,
        "packed_attention": 16}.
    """
    remove(model)
    placed: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for module in model.modules():
        name = type(module).__name__
        operations, forward = _forward_for(module, backend)
        if forward is not None and "forward" not in vars(module):
            forward.operations = operations  # type: ignore[attr-defined]  # what `remove` knows ours by
            module.forward = MethodType(forward, module)
            placed.update(operations)
            if attention.is_known(module) and "packed_attention" not in operations:
                left[f"packed {name} ({attention.packing_refusal(module)})"] += 1
        elif name.endswith(("Norm", "MLP", "Attention")):
            left[name] += 1
    _log(model, f"backend {backend.name} placed under {dict(placed)}", left)
    return dict(placed)


def _log(model: Any, placed: str, left: Counter[str]) -> None:
    """Log what was placed unless that was the last thing logged for the model, and what is left that it never named."""
    last, named = getattr(model, "unsloth_placed", ("", frozenset()))  # peft's models have their base model's
    new = {name: count for name, count in left.items() if name not in named}
    if new or placed != last:
        logger.info(f"{placed}; left as they are: {new}" if new else placed)
    model.unsloth_placed = placed, named | new.keys()


def remove(model: Module) -> None:
    """Give every module that `place` changed its own forward back."""
    for module in model.modules():
        if hasattr(vars(module).get("forward"), "operations"):
            del module.forward


def _forward_for(module: Module, backend: Backend) -> tuple[tuple[str, ...], Forward | None]:
    """The operations and the forward for a module of a known kind; no forward for any other."""
    name = type(module).__name__
    if name in _NORMS:
        return ("rms_norm",), _norm_forward(backend.kernels.rms_norm, *_NORMS[name])
    if name in _GATED_MLPS and type(module.act_fn).__name__ in _GATES:
        operation, options = _GATES[type(module.act_fn).__name__]
        return (operation,), _gated_forward(getattr(backend.kernels, operation), **options)
    if attention.is_known(module):
        refused = attention.packing_refusal(module)
        return ("rope",) if refused else ("rope", "packed_attention"), attention.forward_for(module, backend)
    operations, forward = lora.forward_for(module, backend)
    return operations, forward or attention.stack_forward_for(module)

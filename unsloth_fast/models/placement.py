"""One table of module kinds, and the replacement of `forward` on single module instances.

Classes stay untouched, and with them other models of the process; parameters stay where they are, and with them
state-dict names. The new forward is a bound method: copy.deepcopy binds it to the copy, while a closure would keep the
old module.
"""

import logging
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn import Module

from unsloth_fast.backends import Backend
from unsloth_ref.types import Casting

logger = logging.getLogger(__name__)

Forward = Callable[[Any, Tensor], Tensor]


def _norm_forward(rms_norm: Callable[..., Tensor], eps_name: str, offset: float, casting: Casting) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, getattr(self, eps_name), offset=offset, casting=casting)

    return forward


def _gated_forward(gated: Callable[..., Tensor], **options: Any) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(hidden_states), self.up_proj(hidden_states), **options))

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
    """Give every module of a known kind a forward that calls the backend's operation; log what was done.

    Known kinds are the RMSNorm of Llama, Mistral, Qwen2, Qwen3 and Gemma 1 to 3, and their MLP where it gates with
    SiLU or GELU, under peft's wrappers too. All other modules keep their forward, and so does one whose forward
    somebody else has replaced; those that look like a norm or an MLP are named in the log. Placing again replaces what
    was placed.

    Args:
        model: the model; changed in place, its parameters and their names not.
        backend: of `unsloth_fast.backends.resolve`.

    Returns:
        How many modules each operation was placed under, as {"rms_norm": 33, "swiglu": 16}.
    """
    remove(model)
    placed: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for module in model.modules():
        name = type(module).__name__
        operation, forward = _forward_for(module, backend)
        if forward is not None and "forward" not in vars(module):
            forward.operation = operation  # type: ignore[attr-defined]  # what `remove` knows ours by
            module.forward = MethodType(forward, module)
            placed[operation] += 1
        elif name.endswith(("Norm", "MLP")):
            left[name] += 1
    logger.info("backend %s placed under %s; left as they are: %s", backend.name, dict(placed), dict(left) or "none")
    return dict(placed)


def remove(model: Module) -> None:
    """Give every module that `place` changed its own forward back."""
    for module in model.modules():
        if hasattr(vars(module).get("forward"), "operation"):
            del module.forward


def _forward_for(module: Module, backend: Backend) -> tuple[str, Forward | None]:
    """The operation and the forward for a module of a known kind; ("", None) for any other."""
    name = type(module).__name__
    if name in _NORMS:
        return "rms_norm", _norm_forward(backend.kernels.rms_norm, *_NORMS[name])
    if name in _GATED_MLPS and type(module.act_fn).__name__ in _GATES:
        operation, options = _GATES[type(module.act_fn).__name__]
        return operation, _gated_forward(getattr(backend.kernels, operation), **options)
    return "", None

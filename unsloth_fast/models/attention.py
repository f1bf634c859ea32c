"""Attention of the known families: the rotary embedding, and attention within packed documents.

One forward serves every family: they differ in norms on the heads, in the window and in the cap on the scores alone.
Their own forward cannot be kept, as it takes the rotary embedding from its module's globals: a copy of the function
with other globals is bypassed by torch.compile, which looks globals up in the module of that name.

A packed batch is one row of documents end to end, and comes as transformers' flash attention takes it: cu_seq_lens_q
and max_length_q among the keyword arguments, no attention_mask, position_ids that restart with each document. Without
cu_seq_lens_q the attention, its mask and its caches are those of the model's own attn_implementation.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unsloth_fast.backends import Backend
from unsloth_fast.models.remade import remade

Forward = Callable[..., Any]


def _no_limit(module: Any) -> None:
    return None


def _own_window(module: Any) -> int | None:
    return module.sliding_window


def _config_window(module: Any) -> int | None:
    return module.config.sliding_window


def _softcap(module: Any) -> float | None:
    return module.attn_logit_softcapping


# Where the class keeps its window (W sees the keys i-W < j <= i) and the cap on its scores.
_ATTENTIONS: dict[str, tuple[Callable[[Any], int | None], Callable[[Any], float | None]]] = {
    "LlamaAttention": (_no_limit, _no_limit),
    "MistralAttention": (_config_window, _no_limit),
    "Qwen2Attention": (_own_window, _no_limit),
    "Qwen3Attention": (_own_window, _no_limit),
    "GemmaAttention": (_no_limit, _no_limit),
    "Gemma2Attention": (_own_window, _softcap),
    "Gemma3Attention": (_own_window, _no_limit),
}
# The modules that make the masks for the attentions below them.
_STACKS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel", "Gemma2Model", "Gemma3TextModel")


def is_known(module: Module) -> bool:
    """Whether the module is an attention that `forward_for` has a forward for."""
    return type(module).__name__ in _ATTENTIONS


def packing_refusal(module: Any) -> str | None:
    """Why a known attention's packed batches are left to its own implementation; None if they are not."""
    if module.attention_dropout > 0:
        return f"attention_dropout={module.attention_dropout}"
    if not module.is_causal:
        return "not causal"
    implementation = module.config._attn_implementation
    return None if implementation in ("sdpa", "eager") else f"attn_implementation={implementation}"


def forward_for(module: Module, backend: Backend) -> Forward:
    """The forward of a known attention: the backend's rope, and its packed_attention unless `packing_refusal`."""
    packed_attention = None if packing_refusal(module) else backend.kernels.packed_attention
    eager = sys.modules[type(module).__module__].eager_attention_forward  # what the class falls back on
    window_of, softcap_of = _ATTENTIONS[type(module).__name__]
    return _attention_forward(backend.kernels.rope, packed_attention, eager, window_of, softcap_of)


def stack_forward_for(module: Module) -> Forward | None:
    """The forward of a stack of layers, which keeps masks from being made for packed batches.

    A packed batch needs none, while transformers would make one of [1, 1, T, T] from the position_ids. A mask of four
    dimensions, on the other hand, is handed down to the layers as it is: an empty one says that there is none.

    Returns:
        None if the module is no known stack, or an attention below it does not take packed batches.
    """
    if type(module).__name__ not in _STACKS:
        return None
    attentions = [below for below in module.modules() if is_known(below)]
    if any(packing_refusal(attention) or "forward" in vars(attention) for attention in attentions):
        return None

    @functools.wraps(type(module).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths = kwargs.get("cu_seq_lens_q")
        if lengths is not None:
            if kwargs.get("attention_mask") is not None:
                raise ValueError("attention_mask: got one beside cu_seq_lens_q; allowed: None, nothing is padded then")
            kwargs["attention_mask"] = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=lengths.device)
        return type(self).forward(self, *args, **kwargs)

    return forward


def _attention_forward(
    rope: Callable[..., tuple[Tensor, Tensor]],
    packed_attention: Callable[..., Tensor] | None,
    eager: Callable[..., Any],
    window_of: Callable[[Any], int | None],
    softcap_of: Callable[[Any], float | None],
) -> Forward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        rows = hidden_states.shape[:-1]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        with remade(hidden_states):
            q, k, v = (projection(hidden_states).view(*rows, -1, self.head_dim) for projection in projections)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, S, D]
        # Under autocast the angles can be of a dtype that the projections are not of.
        cos, sin = (angle if angle.dtype == q.dtype else angle.float() for angle in position_embeddings)
        q, k = rope(q, k, cos, sin)
        if cache is not None:  # its name since transformers 5.24
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        elif past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        window, softcap = window_of(self), softcap_of(self)
        if packed_attention is not None and kwargs.get("cu_seq_lens_q") is not None:
            _check_packed(q, k, kwargs)
            documents = (kwargs["cu_seq_lens_q"], kwargs["max_length_q"])
            limits = {"scale": self.scaling, "window": window, "softcap": softcap or 0.0}
            heads = packed_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), *documents, **limits)
            weights = None
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
            dropout = self.attention_dropout if self.training else 0.0
            limits = {"scaling": self.scaling, "sliding_window": window}
            if softcap is not None:
                limits["softcap"] = softcap
            heads, weights = attention(self, q, k, v, attention_mask, dropout=dropout, **limits, **kwargs)
        return self.o_proj(heads.reshape(*rows, -1)), weights

    return forward


def _check_packed(q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a packed batch that is more than one row, or comes with a cache or without its longest."""
    if q.shape[0] != 1:
        raise ValueError(f"input_ids: got {q.shape[0]} rows and cu_seq_lens_q; allowed: 1, all documents end to end")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"past_key_values: got {k.shape[2] - q.shape[2]} tokens and cu_seq_lens_q; allowed: none")
    if kwargs.get("max_length_q") is None:
        raise ValueError("max_length_q: got None and cu_seq_lens_q; allowed: the length of the longest document")

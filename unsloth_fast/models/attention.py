"""Attention of the known families: the rotary embedding, and attention within packed documents.

One forward serves every family: they differ only in the norms on the heads, the window and the cap on the scores. Their
own forward cannot be kept because it takes the rotary embedding from its module's globals: torch.compile looks globals
up in the module of that name, so it would bypass a copy of the function with other globals.

A packed batch is one row of concatenated documents, in the form that transformers' flash attention takes: cu_seq_lens_q
and max_length_q among the keyword arguments, no attention_mask, position_ids that restart with each document. Without
cu_seq_lens_q the attention, its mask and its caches are those of the model's own attn_implementation.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import product_dtype, promoted
from unsloth_fast.models.families import Family, family_of
from unsloth_fast.models.methods import has_own_method
from unsloth_fast.models.protocols import Attention, Forward, KeyValueCache, Placement
from unsloth_fast.models.recomputed import recomputed


def packing_refusal(attention: Attention) -> str | None:
    """Why the module's own implementation computes packed batches; None if `packed_attention` does."""
    if attention.attention_dropout > 0:
        return f"attention_dropout={attention.attention_dropout}"
    if not attention.is_causal:
        return "not causal"
    implementation = _implementation(attention)
    return None if implementation in ("sdpa", "eager") else f"attn_implementation={implementation}"


def attention_placement(attention: Attention, family: Family, backend: Backend) -> Placement:
    """The backend's rope and, unless there is a `packing_refusal`, its packed_attention; and the forward."""
    eager = sys.modules[type(attention).__module__].eager_attention_forward  # the default of the class's own forward
    if packing_refusal(attention):
        return ("rope",), _attention_forward(family, backend.kernels.rope, None, eager)
    kernels = backend.kernels
    return ("rope", "packed_attention"), _attention_forward(family, kernels.rope, kernels.packed_attention, eager)


def stack_forward(stack: Module) -> Forward | None:
    """A forward for a stack of layers that makes no mask for packed batches.

    A packed batch needs no mask, but transformers would make one of [1, 1, T, T] from the position_ids. It passes a
    mask of four dimensions on to the layers unchanged: an empty one means that there is none.

    Returns:
        None if an attention below the stack does not take packed batches.
    """
    attentions = (cast(Attention, module) for module in stack.modules() if family_of(module, "attention"))
    if any(packing_refusal(attention) or has_own_method(attention, "forward") for attention in attentions):
        return None

    @functools.wraps(type(stack).forward)
    def forward(self: Module, *args: object, **kwargs: object) -> object:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if isinstance(cu_seqlens, Tensor):
            mask = kwargs.get("attention_mask")
            if mask is not None and not isinstance(mask, dict):  # an image-text model made masks of its own
                raise ValueError(
                    "attention_mask: got one together with cu_seq_lens_q; allowed: None, as a packed batch has no "
                    "padding"
                )
            kwargs["attention_mask"] = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=cu_seqlens.device)
        return type(self).forward(self, *args, **kwargs)

    return forward


def _attention_forward(
    family: Family,
    rope: Callable[..., tuple[Tensor, Tensor]],
    packed_attention: Callable[..., Tensor] | None,
    eager: Callable[..., Any],
) -> Forward:
    def forward(
        self: Attention,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        cache: KeyValueCache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        rows = hidden_states.shape[:-1]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        with recomputed(hidden_states):
            q, k, v = (projection(hidden_states).view(*rows, -1, self.head_dim) for projection in projections)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, S, D]
        if q.dtype != k.dtype:  # one of them has an adapter, or is in 4 bits
            q, k = promoted(q, k)
        # Under autocast the dtype of the angles can differ from that of the projections.
        cos, sin = (angle if angle.dtype == q.dtype else angle.float() for angle in position_embeddings)
        q, k = rope(q, k, cos, sin)
        if cache is not None:  # the name of past_key_values since transformers 5.24
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        elif past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        window, softcap = _attribute(self, family.window), _attribute(self, family.softcap)
        if packed_attention is not None and kwargs.get("cu_seq_lens_q") is not None:
            _check_packed(q, k, kwargs)
            documents = (kwargs["cu_seq_lens_q"], kwargs["max_length_q"])
            limits = {"scale": self.scaling, "window": window, "softcap": softcap or 0.0}
            if v.dtype != q.dtype or q.dtype == torch.float32:  # as autocast does for torch's own attention
                dtype = product_dtype(q, k, v)
                q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            heads = packed_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), *documents, **limits)
            weights = None
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(_implementation(self), eager)
            dropout = self.attention_dropout if self.training else 0.0
            limits = {"scaling": self.scaling, "sliding_window": window}
            if softcap is not None:
                limits["softcap"] = softcap
            heads, weights = attention(self, q, k, v, attention_mask, dropout=dropout, **limits, **kwargs)
        return self.o_proj(heads.reshape(*rows, -1)), weights

    return forward


def _implementation(attention: Attention) -> Any:
    return attention.config._attn_implementation


def _attribute(attention: Attention, path: str | None) -> Any:
    """The value of an attribute such as "config.sliding_window"; None for no path."""
    if path is None:
        return None
    value: Any = attention
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_packed(q: Tensor, k: Tensor, kwargs: Mapping[str, object]) -> None:
    """Raise ValueError for a packed batch of more than one row, with a cache, or without max_length_q."""
    if q.shape[0] != 1:
        raise ValueError(f"input_ids: got {q.shape[0]} rows and cu_seq_lens_q; allowed: 1 row of all documents")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"past_key_values: got {k.shape[2] - q.shape[2]} tokens and cu_seq_lens_q; allowed: none")
    if kwargs.get("max_length_q") is None:
        raise ValueError("max_length_q: got None and cu_seq_lens_q; allowed: the length of the longest document")

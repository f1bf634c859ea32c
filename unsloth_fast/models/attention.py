"""Attention of the known families: the rotary embedding.

One forward serves every family: they differ only in the norms on the heads, the window and the cap on the scores. Their
own forward cannot be kept because it takes the rotary embedding from its module's globals: torch.compile looks globals
up in the module of that name, so it would bypass a copy of the function with other globals.

The attention itself, its mask and its caches are those of the model's attn_implementation, which is ours for packed
batches (see `unsloth_fast.models.packed`).
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unsloth_fast.backends import Backend
from unsloth_fast.models.dtypes import promoted
from unsloth_fast.models.families import Family
from unsloth_fast.models.protocols import Attention, Forward, KeyValueCache, Placement
from unsloth_fast.models.recomputed import recomputed


def attention_placement(attention: Attention, family: Family, backend: Backend) -> Placement:
    """The backend's rope, and the forward."""
    eager = sys.modules[type(attention).__module__].eager_attention_forward  # the default of the class's own forward
    return ("rope",), _attention_forward(family, backend.kernels.rope, eager)


def _attention_forward(
    family: Family, rope: Callable[..., tuple[Tensor, Tensor]], eager: Callable[..., Any]
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
        implementation: Any = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        dropout = self.attention_dropout if self.training else 0.0
        limits = {"scaling": self.scaling, "sliding_window": window}
        if softcap is not None:
            limits["softcap"] = softcap
        heads, weights = attention(self, q, k, v, attention_mask, dropout=dropout, **limits, **kwargs)
        return self.o_proj(heads.reshape(*rows, -1)), weights

    return forward


def _attribute(attention: Attention, path: str | None) -> Any:
    """The value of an attribute such as "config.sliding_window"; None for no path."""
    if path is None:
        return None
    value: Any = attention
    for name in path.split("."):
        value = getattr(value, name)
    return value

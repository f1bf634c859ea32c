"""A model with a causal and a sliding-window layer, by transformers' attention interface, and variants of its masks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests import tiny


class WindowedConfig(PreTrainedConfig):
    model_type = "windowed"

    def __init__(self, prefix: int = 0, bias: bool = False, **given: Any) -> None:
        """A prefix of positions that all tokens see; whether the scores have a bias."""
        self.vocab_size, self.hidden_size, self.num_hidden_layers = len(tiny.WORDS), 32, 2
        self.num_attention_heads, self.num_key_value_heads, self.sliding_window = 4, 2, 5
        self.max_position_embeddings, self.prefix, self.bias = 64, prefix, bias
        super().__init__(**{"pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False} | given)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    scores = scores if position_bias is None else scores + position_bias
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights


class WindowedAttention(nn.Module):
    def __init__(self, config: WindowedConfig) -> None:
        super().__init__()
        self.config, self.is_causal, self.num_key_value_groups = config, True, 2
        self.mixed = nn.Linear(32, 64)
        self.out = nn.Linear(32, 32)
        self.slopes = nn.Parameter(torch.linspace(0.1, 0.4, 4)[:, None, None])

    def forward(self, states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        q, k, v = self.mixed(states).unflatten(-1, (8, 8)).transpose(1, 2).split((4, 2, 2), 1)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        bias: Tensor | None = None
        if self.config.bias:
            token = torch.arange(states.shape[1])
            bias = (self.slopes * (token[None] - token[:, None]))[None]
        heads, _ = attention(self, q, k, v, attention_mask, scaling=0.3, position_bias=bias, **kwargs)
        return self.out(heads.flatten(2))


def eager_attention_with_loud_sinks(module: Any, *args: Any, **given: Any) -> tuple[Tensor, Tensor]:
    """They multiply what the softmax gives."""
    heads, weights = eager_attention_forward(module, *args, **given)
    return heads * module.sinks[:, None], weights


class LoudAttention(WindowedAttention):
    def __init__(self, config: WindowedConfig) -> None:
        super().__init__(config)
        self.sinks = nn.Parameter(torch.linspace(0.5, 2.0, 4))

    def forward(self, states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        q, k, v = self.mixed(states).unflatten(-1, (8, 8)).transpose(1, 2).split((4, 2, 2), 1)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_with_loud_sinks
        )
        heads, _ = attention(self, q, k, v, attention_mask, scaling=0.3, **kwargs)
        return self.out(heads.flatten(2))


class WindowedLayer(nn.Module):
    def __init__(self, config: WindowedConfig) -> None:
        super().__init__()
        self.attention, self.norm = WindowedAttention(config), nn.LayerNorm(32)

    def forward(self, states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return states + self.attention(self.norm(states), attention_mask=attention_mask, **kwargs).tanh()


class WindowedPreTrainedModel(PreTrainedModel):
    config_class = WindowedConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True


class WindowedModel(WindowedPreTrainedModel):
    def __init__(self, config: WindowedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, 32)
        self.places = nn.Embedding(config.max_position_embeddings, 32)
        self.layers = nn.ModuleList(WindowedLayer(config) for _ in range(2))
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        states = self.embed_tokens(input_ids) + self.places(position_ids)
        given = (self.config, states, attention_mask, None, position_ids)
        prefix: Any = None
        if self.config.prefix:

            def prefix(row: Any, head: Any, query: Any, key: Any) -> Any:
                return key < self.config.prefix

        masks = (create_causal_mask(*given, or_mask_function=prefix), create_sliding_window_causal_mask(*given))
        for mask, layer in zip(masks, self.layers, strict=True):
            states = layer(states, attention_mask=mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=states)


class WindowedForCausalLM(WindowedPreTrainedModel, GenerationMixin):
    def __init__(self, config: WindowedConfig) -> None:
        super().__init__(config)
        self.model = WindowedModel(config)
        self.lm_head = nn.Linear(32, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        found = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        logits = self.lm_head(found.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class OwnMaskModel(WindowedModel):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Make a causal mask that takes no notice of documents."""
        states = self.embed_tokens(input_ids)
        seen = torch.ones(2 * input_ids.shape[1:], dtype=torch.bool).tril()
        for layer in self.layers:
            states = layer(states, attention_mask=seen[None, None], **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=states)


class WithOwnMask(WindowedForCausalLM):
    def __init__(self, config: WindowedConfig) -> None:
        super().__init__(config)
        self.model = OwnMaskModel(config)


class SlicingAttention(WindowedAttention):
    def forward(self, states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Changes its mask first, as with static caches."""
        attention_mask = None if attention_mask is None else attention_mask[..., : states.shape[1]]
        return super().forward(states, attention_mask=attention_mask, **kwargs)


class ComparingLayer(WindowedLayer):
    def forward(self, states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Does something else for one implementation."""
        scale = 1.0 if self.attention.config._attn_implementation == "sdpa" else 2.0
        return states + scale * self.attention(states, attention_mask=attention_mask, **kwargs)


class RenamingAttention(WindowedAttention):
    def forward(self, states: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        """Has its mask under another name."""
        assert ALL_ATTENTION_FUNCTIONS
        return super().forward(states, **kwargs)


class ScalingModel(WindowedModel):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Computes with the mask that transformers made."""
        states = self.embed_tokens(input_ids)
        mask: Any = create_causal_mask(self.config, states, attention_mask, None, position_ids)
        mask = mask if mask is None else mask & True
        for layer in self.layers:
            states = layer(states, attention_mask=mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=states)

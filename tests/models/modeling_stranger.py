"""A model whose code comes with it, in one file that a folder of weights has beside them.

One head of keys and values, whose sizes differ; norms after attention and MLP, which stand beside each other; the
embedding is the head, which has a bias, or the head is an MLP; a learned factor on the logits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

H, HEADS, OF_KEYS, OF_VALUES, INNER = 32, 4, 8, 12, 48


class StrangerConfig(PreTrainedConfig):
    model_type = "stranger"

    def __init__(self, vocab_size: int = 48, deep_head: bool = False, **given: Any) -> None:
        self.vocab_size, self.hidden_size, self.deep_head = vocab_size, H, deep_head
        self.num_hidden_layers, self.num_attention_heads, self.max_position_embeddings = 2, HEADS, 64
        super().__init__(**{"pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": not deep_head} | given)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
) -> tuple[Tensor, None]:
    scores = query @ key.mT * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class StrangerAttention(nn.Module):
    def __init__(self, config: StrangerConfig) -> None:
        super().__init__()
        self.config, self.is_causal, self.num_key_value_groups = config, True, HEADS
        self.q, self.k, self.v = (nn.Linear(H, size, bias=False) for size in (HEADS * OF_KEYS, OF_KEYS, OF_VALUES))
        self.o = nn.Linear(HEADS * OF_VALUES, H)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        heads = self.q(x).unflatten(-1, (HEADS, OF_KEYS)).transpose(1, 2)
        function = eager_attention_forward
        if self.config._attn_implementation != "eager":
            function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, _ = function(self, heads, self.k(x)[:, None], self.v(x)[:, None], attention_mask, scaling=OF_KEYS**-0.5)
        return self.o(y.flatten(2))


class StrangerLayer(nn.Module):
    def __init__(self, config: StrangerConfig) -> None:
        super().__init__()
        self.attention, self.wide, self.narrow = StrangerAttention(config), nn.Linear(H, 2 * INNER), nn.Linear(INNER, H)
        self.after_attention, self.after_mlp = nn.RMSNorm(H, eps=1e-5), nn.RMSNorm(H, eps=1e-5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        gate, up = self.wide(x).chunk(2, -1)
        mlp = self.after_mlp(self.narrow(nn.functional.silu(gate) * up))
        return x + self.after_attention(self.attention(x, attention_mask=attention_mask)) + 0.5 * mlp


class StrangerPreTrainedModel(PreTrainedModel):
    config_class = StrangerConfig
    base_model_prefix = "body"
    _supports_sdpa = True
    _supports_attention_backend = True


class StrangerModel(StrangerPreTrainedModel):
    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.embed_tokens, self.places = nn.Embedding(config.vocab_size, H), nn.Embedding(64, H)
        self.layers = nn.ModuleList(StrangerLayer(config) for _ in range(2))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.embed_tokens(input_ids) + self.places(position_ids)
        mask = create_causal_mask(self.config, x, attention_mask, None, position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=mask)
        return x


class StrangerForCausalLM(StrangerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "body.embed_tokens.weight"}  # noqa: RUF012  # as transformers' classes

    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.body, self.factor = StrangerModel(config), nn.Parameter(torch.tensor(0.7))
        self.lm_head: nn.Module = nn.Linear(H, config.vocab_size)
        if config.deep_head:
            self.lm_head = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, config.vocab_size))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        logits = self.factor * self.lm_head(self.body(input_ids, attention_mask, position_ids, **kwargs))
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

"""A language model of a class that transformers does not have, with norms and MLPs of its own making."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tests import tiny


class CustomConfig(PreTrainedConfig):
    """Sizes, and the divisor of the logits."""

    model_type = "custom"
    hidden_size = 32
    inner_size = 40
    vocab_size = len(tiny.WORDS)
    num_hidden_layers = 2
    logits_scaling = 4.0


class RootMeanSquare(nn.Module):
    """The weight is 1 larger than it is stored; one rounding."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.randn(size) / 3), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide / (wide.square().mean(-1, keepdim=True) + self.epsilon).sqrt() * (1 + self.weight.float())).to(x)


class FeedForward(nn.Module):
    """One projection for both factors, the gate last; the activation is no module."""

    def __init__(self, config: CustomConfig) -> None:
        super().__init__()
        self.widen = nn.Linear(config.hidden_size, 2 * config.inner_size)
        self.narrow = nn.Linear(config.inner_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.widen(x).chunk(2, -1)
        return self.narrow(silu(gate) * up)


class Block(nn.Module):
    """Attention of one head without positions, then the MLP."""

    def __init__(self, config: CustomConfig) -> None:
        super().__init__()
        self.first, self.second = RootMeanSquare(config.hidden_size), RootMeanSquare(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.feed_forward(self.second(x))


class CustomModel(PreTrainedModel):
    """Embedding, blocks and a norm."""

    config_class = CustomConfig

    def __init__(self, config: CustomConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.last = RootMeanSquare(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutput:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=self.last(x))


class CustomForCausalLM(PreTrainedModel):
    """Its logits are divided."""

    config_class = CustomConfig
    base_model_prefix = "body"

    def __init__(self, config: CustomConfig) -> None:
        super().__init__(config)
        self.body = CustomModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.classifier

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        logits = self.classifier(self.body(input_ids).last_hidden_state) / self.config.logits_scaling
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

"""Modules and models of no library: some join the documents of a row, others keep them apart."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from tests import tiny
from tests.models.windowed import WindowedConfig, WindowedForCausalLM, WindowedModel

HIDDEN = 32


def with_module(name: str, make: Callable[[Any], nn.Module], **config: Any) -> PreTrainedModel:
    """A Llama in float64 in which one module is made of the one that was there."""
    torch.manual_seed(0)
    model = tiny.model(dtype=torch.float64, **config)
    model.set_submodule(name, make(model.get_submodule(name)).double())
    return model


class OwnAttention(nn.Module):
    """Causal over the whole row."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.mixed = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = self.mixed(hidden_states)[:, None].chunk(3, -1)
        return scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0], None


class DeafAttention(OwnAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        """Takes a mask and does not look at it."""
        return super().forward(hidden_states, **kwargs)


class After(nn.Module):
    """Another function of what a module returns."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.own(x))

    def change(self, x: Tensor) -> Tensor:
        return x


class Convolved(After):
    """By a convolution over tokens that is not trained yet."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__(own)
        self.taps = nn.Parameter(torch.zeros(4, HIDDEN))

    def change(self, x: Tensor) -> Tensor:
        return x + sum(pad(x, (0, 0, lag, -lag)) * taps for lag, taps in enumerate(self.taps) if lag < x.shape[1])


class Pooled(After):
    """Each token gets the mean of the last complete block of 32 tokens before it."""

    def change(self, x: Tensor) -> Tensor:
        blocks = x[:, : x.shape[1] // 32 * 32].unflatten(1, (-1, 32)).mean(2).repeat_interleave(32, 1)
        return x + pad(blocks, (0, 0, 32, 0))[:, : x.shape[1]]


class Placed(After):
    """Learned positions, of the row."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__(own)
        self.places = nn.Embedding(256, HIDDEN)

    def change(self, x: Tensor) -> Tensor:
        return x + self.places(torch.arange(x.shape[1]))


class Experts(nn.Module):
    """Each token takes two of four experts; or each expert takes half of all tokens."""

    def __init__(self, own: nn.Module, of_expert: bool = False) -> None:
        super().__init__()
        self.router, self.of_expert = nn.Linear(HIDDEN, 4, bias=False), of_expert
        config: Any = tiny.model().config
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights = self.router(rows).softmax(-1)
        dimension, count = (0, (len(rows) + 1) // 2) if self.of_expert else (1, 2)
        chosen = torch.zeros_like(weights).scatter(dimension, weights.topk(count, dimension).indices, 1.0)
        y = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            (taken,) = chosen[:, index].nonzero(as_tuple=True)
            y = y.index_add(0, taken, expert(rows[taken]) * weights[taken, index, None])
        return y.view_as(x)


class Shifted(nn.Module):
    """Half of the row before."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + pad(x, (0, 0, 1, -1))) / 2


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Cropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :-3]


def with_own_forward() -> PreTrainedModel:
    """A method of one layer is replaced."""
    model = with_module("model.norm", lambda own: own)
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    mlp.forward = MethodType(lambda self, x: LlamaMLP.forward(self, x + pad(x, (0, 0, 1, -1))), mlp)
    return model


class CopiedConfigModel(WindowedModel):
    """One of its masks is made from a configuration of its own, for another implementation than the model's."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        states = self.embed_tokens(input_ids)
        local = WindowedConfig(attn_implementation="sdpa")
        masks = (
            create_causal_mask(self.config, states, attention_mask, None, position_ids),
            create_sliding_window_causal_mask(local, states, attention_mask, None, position_ids),
        )
        for mask, layer in zip(masks, self.layers, strict=True):
            states = layer(states, attention_mask=mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=states)


def with_copied_config() -> PreTrainedModel:
    config = WindowedConfig()
    model = WindowedForCausalLM(config)
    model.model = CopiedConfigModel(config)
    return model.double()


class WithoutMask(LlamaForCausalLM):
    """No module below takes a mask."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.model
        self.body, self.embedding = OwnAttention(self), nn.Embedding(config.vocab_size, HIDDEN)
        self.base_model_prefix = "body"

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.body(self.embedding(input_ids))[0]))


JOINING: dict[str, Callable[[], PreTrainedModel]] = {
    "an attention of its own": lambda: with_module("model.layers.1.self_attn", OwnAttention),
    "an attention that ignores its mask": lambda: with_module("model.layers.1.self_attn", DeafAttention),
    "no mask at all": lambda: WithoutMask(tiny.model().config).double(),
    "a convolution that is 0": lambda: with_module("model.layers.0.input_layernorm", Convolved),
    "torch's convolution": lambda: with_module(
        "model.layers.0.mlp",
        lambda own: nn.Sequential(Transposed(), nn.Conv1d(HIDDEN, HIDDEN, 4, padding=3), Cropped(), Transposed()),
    ),
    "pooled blocks": lambda: with_module("model.layers.0.mlp", Pooled, max_position_embeddings=512),
    "positions of the row": lambda: with_module("model.embed_tokens", Placed),
    "shifted embeddings": lambda: with_module("model.embed_tokens", lambda own: nn.Sequential(own, Shifted())),
    "experts that choose tokens": lambda: with_module("model.layers.0.mlp", lambda own: Experts(own, True)),
    "a forward of its own": with_own_forward,
    "a mask of another configuration": with_copied_config,
}


class ParallelLayer(LlamaDecoderLayer):
    """Attention and MLP beside each other, and a factor on what they add."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = self.input_layernorm(hidden_states)
        return hidden_states + 0.7 * (self.self_attn(hidden_states=x, **kwargs)[0] + self.mlp(x))


def parallel(own: Any) -> nn.Module:
    """The layer with the same weights."""
    made = ParallelLayer(own.self_attn.config, own.self_attn.layer_idx)
    made.load_state_dict(own.state_dict())
    return made


class ByLayer(LlamaModel):
    """A window and a base of the rotations in the second layer alone."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        x = self.embed_tokens(input_ids)
        position_ids = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
        given = (self.config, x, attention_mask, None, position_ids)
        full, local = create_causal_mask(*given), create_sliding_window_causal_mask(*given)
        for stride, mask, layer in zip((1, 3), (full, local), self.layers, strict=True):
            rotation = self.rotary_emb(x, position_ids=stride * position_ids)
            x = layer(x, attention_mask=mask, position_embeddings=rotation, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class Sum(After):
    """A factor, and a constant."""

    def change(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.1


APART: dict[str, Callable[[], PreTrainedModel]] = {
    "experts of its own": lambda: with_module("model.layers.0.mlp", Experts),
    "parallel layers": lambda: with_module("model.layers.1", parallel),
    "a norm with a factor": lambda: with_module("model.norm", Sum),
    "a window and a rotation of one layer": lambda: with_module(
        "model", lambda own: ByLayer(own.config), sliding_window=3
    ),
}

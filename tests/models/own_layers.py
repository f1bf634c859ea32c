"""Language models whose attentions, masks, norms and MLPs are of their own: one kind per entry of `LAYERS`."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu, softplus
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests import tiny

HIDDEN, HEADS, WIDTH, INNER = 32, 4, 8, 48


class OwnConfig(PreTrainedConfig):
    model_type = "own_layers"

    def __init__(self, **given: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = len(tiny.WORDS), HIDDEN, 2
        self.num_attention_heads, self.max_position_embeddings, self.temper = HEADS, 64, 1.7
        super().__init__(**{"pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False} | given)


class RootNorm(nn.Module):
    """A norm whose eps has a name of its own."""

    def __init__(self, size: int = HIDDEN, tiny_number: float = 1e-3) -> None:
        super().__init__()
        self.weight, self.tiny_number = nn.Parameter(1 + 0.3 * torch.randn(size)), tiny_number

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.tiny_number)
        return self.weight * normed.to(x.dtype)


class ScaledNorm(nn.Module):
    """The same parameters, but eps stands outside of the root: no RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.tiny_number = nn.Parameter(1 + 0.3 * torch.randn(HIDDEN)), 1e-2

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + self.tiny_number)


class TwoGates(nn.Module):
    """An MLP with two gates beside the other factor, from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.down = nn.Linear(HIDDEN, 3 * INNER, bias=False), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        first, second, up = self.wide(x).chunk(3, -1)
        return self.down(silu(first) * second.sigmoid() * up)


class ThreeGates(nn.Module):
    """The names of a gated MLP, with an activation that is none of the usual ones."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(softplus(self.gate_proj(x)) * gelu(self.gate_proj(x)) * self.up_proj(x))


def rotate_pairs(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation of the first half of the columns, under arguments of its own."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def rotated(x: Tensor) -> Tensor:
        (first, second), rest = x[..., : WIDTH // 2].chunk(2, -1), x[..., WIDTH // 2 :]
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1)

    return rotated(q), rotated(k)


def angles_of(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Of two pairs of columns, [B, S, 2]."""
    return position_ids[..., None].to(dtype) * torch.tensor([1.0, 0.1], dtype=dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scores: Any = None, mask: Tensor | None = None) -> Tensor:
    """[B, N, S, D] each, causal; scores are added, and a mask of padding is [B, S]."""
    length = q.shape[2]
    found = q @ k.mT / math.sqrt(WIDTH)
    found = found if scores is None else found + scores
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    if mask is not None:
        hidden = hidden | (mask[:, None, None, :] == 0)
    return found.masked_fill(hidden, torch.finfo(found.dtype).min).softmax(-1) @ v


class FusedAttention(nn.Module):
    """Fused projections, and an attention of its own under no interface, with ALiBi in place of positions."""

    def __init__(self, alibi: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.alibi = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN), alibi

    def forward(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = None
        if self.alibi:
            token = torch.arange(x.shape[1])
            slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=x.dtype)[:, None, None]
            scores = slopes * (token[None] - token[:, None])
        else:
            q, k = rotate_pairs(q, k, angles_of(position_ids, x.dtype))
        return self.out(plain_attention(q, k, v, scores, attention_mask).transpose(1, 2).flatten(2))


def eager_scaled_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The function for "eager", under a name of its own."""
    scores = query @ key.mT * kwargs["scaling"]
    scores = scores if attention_mask is None else scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class InterfaceAttention(nn.Module):
    """Fused projections, and transformers' interface."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.config, self.is_causal = config, True
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor, **kwargs: Any) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = rotate_pairs(q, k, angles_of(position_ids, x.dtype))
        scaled_attention = eager_scaled_attention
        if self.config._attn_implementation != "eager":
            scaled_attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        heads, _ = scaled_attention(self, q, k, v, attention_mask, scaling=0.3, **kwargs)
        return self.out(heads.flatten(2))


class Sequential(nn.Module):
    """A layer whose parts follow each other."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, norm: type[nn.Module]) -> None:
        super().__init__()
        self.attention, self.mlp, self.first, self.second = attention, mlp, norm(), norm()

    def forward(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        x = x + self.attention(self.first(x), attention_mask=attention_mask, position_ids=position_ids)
        return x + self.mlp(self.second(x))


class Parallel(Sequential):
    """A layer whose attention and MLP read the same norm."""

    def forward(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        normed = self.first(x)
        mixed = self.attention(normed, attention_mask=attention_mask, position_ids=position_ids)
        return self.second(x) + 0.5 * (mixed + self.mlp(normed))


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True


class OwnModel(OwnPreTrainedModel):
    """The layers of a kind, which get a mask of padding."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.tokens, self.layers = nn.Embedding(config.vocab_size, HIDDEN), nn.ModuleList(LAYERS[config.kind](config))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        states = self.tokens(input_ids)
        for layer in self.layers:
            states = layer(states, attention_mask=attention_mask, position_ids=position_ids)
        return BaseModelOutputWithPast(last_hidden_state=states)


class MaskedModel(OwnModel):
    """The layers of a kind, which get transformers' mask."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        states = self.tokens(input_ids)
        causal_mask = create_causal_mask(self.config, states, attention_mask, None, position_ids)
        for layer in self.layers:
            states = layer(states, attention_mask=causal_mask, position_ids=position_ids)
        return BaseModelOutputWithPast(last_hidden_state=states)


def seen_by(config: Any, states: Tensor, padding: Tensor | None, places: Tensor) -> Any:
    """A function of this file that makes the mask."""
    return create_causal_mask(config, states, padding, None, places)


class HelpedModel(OwnModel):
    """Methods make the masks, by transformers' function, which the forward does not mention."""

    def masks_for(self, states: Tensor, padding: Tensor | None, places: Tensor) -> tuple[Any, Any]:
        given = (self.config, states, padding)
        return create_causal_mask(*given, None, places), seen_by(*given, places)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        states = self.tokens(input_ids)
        for mask, layer in zip(self.masks_for(states, attention_mask, position_ids), self.layers, strict=True):
            states = layer(states, attention_mask=mask, position_ids=position_ids)
        return BaseModelOutputWithPast(last_hidden_state=states)


class HandMadeModel(HelpedModel):
    """The same, but a method makes a dense mask by hand, without a look at documents."""

    def masks_for(self, states: Tensor, padding: Tensor | None, places: Tensor) -> tuple[Any, Any]:
        seen = torch.ones(2 * [states.shape[1]], dtype=torch.bool).tril()[None, None]
        seen = seen if padding is None else seen & (padding[:, None, None, :] != 0)
        return seen, seen


class OwnForCausalLM(OwnPreTrainedModel, GenerationMixin):
    """A head with a bias, a factor and a squashing, whose names in the configuration are its own."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model = STACKS.get(config.kind, MaskedModel)(config)
        self.lm_head = nn.Linear(HIDDEN, config.vocab_size)
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
        logits = self.lm_head(found.last_hidden_state) * self.config.temper
        logits = 3 * (logits / 3).tanh() if self.config.kind == "shared" else logits
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class WithoutKeywords(OwnForCausalLM):
    """Its forward takes three arguments alone, and no cache."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutputWithPast:
        return super().forward(input_ids, attention_mask, None, labels)


class ByPosition(OwnForCausalLM):
    """Its stack gets all arguments by position."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        found = self.model(input_ids, attention_mask, position_ids, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(found.last_hidden_state))


class WithTuples(OwnForCausalLM):
    """Its forward returns logits in a tuple."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (super().forward(*args, **kwargs).logits,)


def _shared(config: OwnConfig) -> list[nn.Module]:
    """The same layer twice, and a third one with the attention of the first."""
    layer = Sequential(InterfaceAttention(config), TwoGates(), RootNorm)
    return [layer, layer, Sequential(layer.attention, ThreeGates(), ScaledNorm)]


class HelpedAttention(InterfaceAttention):
    """A method looks up the attention function."""

    def forward(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor, **kwargs: Any) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(*rotate_pairs(q, k, angles_of(position_ids, x.dtype)), v, attention_mask))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        found = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](self, q, k, v, seen, scaling=0.3)
        return found[0].flatten(2)


STACKS: dict[str, type[OwnModel]] = {"alibi": OwnModel, "own attention": OwnModel}
STACKS |= {"helped": HelpedModel, "hand-made": HandMadeModel}
PADDED = ("alibi", "own attention", "hand-made")
LAYERS: dict[str, Any] = {
    "alibi": lambda config: [Parallel(FusedAttention(True), TwoGates(), RootNorm) for _ in range(2)],
    "own attention": lambda config: [Sequential(FusedAttention(False), ThreeGates(), ScaledNorm) for _ in range(2)],
    "interface": lambda config: [Sequential(InterfaceAttention(config), TwoGates(), ScaledNorm) for _ in range(2)],
    "parallel": lambda config: [Parallel(InterfaceAttention(config), ThreeGates(), RootNorm) for _ in range(2)],
    "shared": _shared,
    "helped": lambda config: [Sequential(HelpedAttention(config), TwoGates(), RootNorm) for _ in range(2)],
    "hand-made": lambda config: [Sequential(InterfaceAttention(config), TwoGates(), RootNorm) for _ in range(2)],
}


def model(kind: str, dtype: torch.dtype = torch.float64, of: type[OwnForCausalLM] = OwnForCausalLM) -> OwnForCausalLM:
    """A model of one of `LAYERS`."""
    torch.manual_seed(0)
    made: Any = of(OwnConfig(kind=kind))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made.to(dtype)

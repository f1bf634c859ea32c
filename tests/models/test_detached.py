"""Modules that compute what an operation does and hide a part of it from autograd: they keep their forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaConfig, MixtralConfig
from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from unsloth_fast.models.mixers import recognise_mixer
from unsloth_fast.models.structure import recognise

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 1}


class Statistic(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * root.detach()).to(hidden_states.dtype)


class Weight(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight.detach() * (wide * root).to(hidden_states.dtype)


class Frozen(LlamaRMSNorm):
    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class Gate(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)).detach() * self.up_proj(x))


class HalfGate(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * gate.detach().sigmoid() * self.up_proj(x))


class Routing(MixtralExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights.detach())


class Input(Lfm2ShortConv):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states.detach(), *args, **kwargs)


EXPERTS: dict[str, Any] = SIZES | {"num_local_experts": 2, "experts_implementation": "eager"}
DETACHED: dict[str, Callable[[], nn.Module]] = {
    "a statistic": lambda: Statistic(16),
    "the weight": lambda: Weight(16),
    "all": lambda: Frozen(16),
    "the gate": lambda: Gate(LlamaConfig(**SIZES)),
    "half of the gate": lambda: HalfGate(LlamaConfig(**SIZES)),
    "the weights of experts": lambda: Routing(MixtralConfig(**EXPERTS)),
    "the input of a mixer": lambda: Input(Lfm2Config(**SIZES), 0),
}


@pytest.mark.parametrize("what", DETACHED)
def test_a_part_without_a_gradient(what: str) -> None:
    """The class below computes the same, with every gradient. No parameter is changed by the check."""
    module: Any = DETACHED[what]()
    next(module.parameters()).requires_grad_(False)
    trained = [each.requires_grad for each in module.parameters()]
    assert (recognise_mixer(module, {}) or recognise(module, {})) == "has other gradients"
    assert [each.requires_grad for each in module.parameters()] == trained
    assert all(each.grad is None for each in module.parameters())
    module.__class__ = type(module).__base__
    assert not isinstance(recognise_mixer(module, {}) or recognise(module, {}), str | None)

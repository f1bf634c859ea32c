"""Norms and gated MLPs that are recognised by what they compute, and wrong ones that look like them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4UnweightedRMSNorm
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from tests import tiny
from unsloth_fast import backends
from unsloth_fast.models import place
from unsloth_fast.models.mlp import Gated
from unsloth_fast.models.norm import GatedNorm, LayerNorm, Norm
from unsloth_fast.models.structure import recognise

REFERENCE = backends.resolve("reference")


def mlp(activation: str = "silu", hidden: int = 16) -> LlamaMLP:
    sizes = {"hidden_size": hidden, "intermediate_size": 40, "num_attention_heads": 1}
    return LlamaMLP(LlamaConfig(**sizes, hidden_act=activation))


def changed(base: type[nn.Module], change: Callable[..., Tensor]) -> type[nn.Module]:
    """The class with another forward, under the same name."""
    return type(base.__name__, (base,), {"forward": change})


def llama_norm(self: Any, x: Tensor, weight: Tensor | None = None, center: float = 0.0) -> Tensor:
    wide = x.float()
    wide = wide - center * wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return (self.weight if weight is None else weight) * normed.to(x.dtype)


def plain(self: Any, x: Tensor) -> Tensor:
    return llama_norm(self, x)


def offset_by_one(self: Any, x: Tensor) -> Tensor:
    return llama_norm(self, x.float(), 1.0 + self.weight.float()).to(x.dtype)


def offset_by_half(self: Any, x: Tensor) -> Tensor:
    return llama_norm(self, x, 0.5 + self.weight)


def centered(self: Any, x: Tensor) -> Tensor:
    return llama_norm(self, x, center=1.0)


def another_eps(self: Any, x: Tensor) -> Tensor:
    wide = x.float()
    return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rounds_twice(self: Any, x: Tensor) -> Tensor:
    return self.weight * (llama_norm(self, x, torch.ones_like(x)) * 1.0).to(torch.bfloat16).to(x.dtype)


def gated(self: Any, x: Tensor) -> Tensor:
    gate = llama_norm(self, x)
    return gate * x.sigmoid()


NORMS = {
    "llama": (LlamaRMSNorm(16), Norm("variance_epsilon", 0.0, "llama")),
    "gemma": (Gemma3RMSNorm(16), Norm("eps", 1.0, "gemma")),
    "one rounding": (Olmo2RMSNorm(16), Norm("variance_epsilon", 0.0, "gemma")),
    "torch's": (nn.RMSNorm(16, eps=1e-6), Norm("eps", 0.0, "gemma")),
    "without memory": (LlamaRMSNorm(16).to("meta"), Norm("variance_epsilon", 0.0, "llama")),
    "rewritten": (changed(LlamaRMSNorm, plain)(16), Norm("variance_epsilon", 0.0, "llama")),
    "layer norm without a bias": (CohereLayerNorm(16), LayerNorm("variance_epsilon")),
    "without a weight": (Gemma4RMSNorm(16, with_scale=False), Norm("eps", 0.0, "gemma", weighted=False)),
    "torch's without a weight": (
        nn.RMSNorm(16, eps=1e-6, elementwise_affine=False),
        Norm("eps", 0.0, "gemma", weighted=False),
    ),
    "without a weight or sizes": (Llama4TextL2Norm(), Norm("eps", 0.0, "gemma", weighted=False)),
    "offset 1 in disguise": (changed(LlamaRMSNorm, offset_by_one)(16), Norm("variance_epsilon", 1.0, "gemma")),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    """Their offset and how they round are found without a look at their weights or their classes' names."""
    module, expected = NORMS[name]
    assert recognise(module, {}) == expected


def ungated(self: Any, x: Tensor, gate: Tensor) -> Tensor:
    return llama_norm(self, x) * gate


GATED_NORMS = {
    "qwen3_next": (Qwen3NextRMSNormGated(16), GatedNorm("variance_epsilon", 16, True, "llama")),
    "mamba2": (MambaRMSNormGated(16, 4), GatedNorm("variance_epsilon", 4, False, "llama")),
    "falcon_h1": (FalconH1RMSNormGated(16, n_groups=2), GatedNorm("variance_epsilon", 8, True, "gemma")),
    "falcon_h1, gate first": (
        FalconH1RMSNormGated(16, norm_before_gate=False),
        GatedNorm("variance_epsilon", 16, False, "gemma"),
    ),
}


@pytest.mark.parametrize("name", GATED_NORMS)
def test_gated_norms(name: str) -> None:
    """Their order, groups and rounding are found; placed, they compute the same values and gradients in float64."""
    module, expected = GATED_NORMS[name]
    if name == "mamba2" and not hasattr(module, "group_size"):
        pytest.skip("this transformers has no groups there")
    assert recognise(module, {}) == expected
    module = module.double()
    x, gate = (torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sources = [x, gate, module.weight]
    with tiny.KeepFloat64():
        own = module(x, gate)
        gradients = torch.autograd.grad(own.square().sum(), sources)
    assert place(module, REFERENCE) == {"gated_rms_norm": 1}
    found = module(x, gate)
    torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(torch.autograd.grad(found.square().sum(), sources), gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


def test_a_norm_with_another_gate_is_left_alone() -> None:
    """A product with the gate itself is no gated norm; a gated norm without its gate computes what it did."""
    found = recognise(changed(LlamaRMSNorm, ungated)(16), {})
    assert isinstance(found, str) and found.startswith("differs from every gated_rms_norm by ")
    norm, x = MambaRMSNormGated(16, 4), torch.randn(3, 16)
    expected = norm(x)
    place(norm, REFERENCE)
    assert torch.equal(norm(x), expected)


def test_a_norm_without_a_weight_computes_the_same() -> None:
    """Heads of any width, from a projection; bits are equal in bfloat16, values and gradients in float64."""
    norm = Llama4TextL2Norm(1e-5)
    heads = torch.randn(2, 5, 96).view(2, 5, 3, 32).transpose(1, 2)
    x = heads.double().requires_grad_()
    with tiny.KeepFloat64():
        expected = norm(heads.bfloat16()), norm(x), *torch.autograd.grad(norm(x).sin().sum(), x)
    assert place(norm, REFERENCE) == {"rms_norm": 1}
    found = norm(heads.bfloat16()), norm(x), *torch.autograd.grad(norm(x).sin().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(found[0], expected[0])


def test_modules_without_parameters_are_no_norms() -> None:
    """DeepSeek V4 rounds the factor of its norm to 16 bits; others are no RMSNorms, have no eps or take two inputs."""
    assert str(recognise(DeepseekV4UnweightedRMSNorm(), {})).startswith("differs from every rms_norm by ")
    assert str(recognise(nn.LayerNorm(24, elementwise_affine=False), {})).startswith("differs from every rms_norm by ")
    others = nn.SiLU(), nn.Identity(), nn.Dropout(0.1), nn.PairwiseDistance(), nn.ELU()
    assert [recognise(module, {}) for module in others] == [None] * len(others)


@pytest.mark.parametrize("change", [offset_by_half, centered, another_eps, rounds_twice, gated])
def test_a_wrong_norm_is_left_alone(change: Callable[..., Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """Its class has the name and the attributes of LlamaRMSNorm; the log says by how much it differs."""
    model = nn.ModuleList([changed(LlamaRMSNorm, change)(16)])
    with caplog.at_level("INFO"):
        assert place(model, REFERENCE) == {}
    assert "forward" not in vars(model[0])
    assert "{'LlamaRMSNorm (differs from every rms_norm by " in caplog.text


class Fused(nn.Module):
    """Gate and other factor from one projection."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(16, 80, bias=False), nn.Linear(40, 16)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        """[T, 16] to [T, 16]."""
        return self.out(self.make(self.both(x)))


class Named(nn.Module):
    """The names of LFM2; the activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        """[T, 16] to [T, 16]."""
        return self.w2(silu(self.w1(x)) * self.w3(x))


def halves(product: Callable[[Tensor, Tensor], Tensor], gate_first: bool = True) -> Fused:
    return Fused(lambda both: product(*(both.chunk(2, -1) if gate_first else both.chunk(2, -1)[::-1])))


class Squared(nn.Module):
    """An MLP without a gate."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, 40), nn.Linear(40, 16)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[T, 16] to [T, 16]."""
        return self.out(self.activation(self.into(x)))


MLPS = {
    "llama": (mlp(), Gated("swiglu", None, "gate_proj", "up_proj", "down_proj")),
    "gelu": (mlp("gelu", hidden=40), Gated("geglu", "none", "gate_proj", "up_proj", "down_proj")),
    "tanh": (mlp("gelu_pytorch_tanh"), Gated("geglu", "tanh", "gate_proj", "up_proj", "down_proj")),
    "other names": (Named(), Gated("swiglu", None, "w1", "w3", "w2")),
    "squared": (Squared(lambda x: x.relu() ** 2), Gated("relu_squared", None, "into", "into", "out")),
    "fused": (halves(lambda gate, up: silu(gate) * up), Gated("swiglu", None, "both", "both", "out")),
    "gate last": (halves(lambda g, u: silu(g) * u, False), Gated("swiglu", None, "both", "both", "out", False)),
}


@pytest.mark.parametrize("name", MLPS)
def test_gated_mlps(name: str) -> None:
    """The roles of their layers, whatever they are called, and the activation are found."""
    module, expected = MLPS[name]
    assert recognise(module, {}) == expected


@pytest.mark.parametrize("name", MLPS)
def test_a_placed_mlp_computes_the_same(name: str) -> None:
    """Its value and gradients agree in float64."""
    module = MLPS[name][0].double()
    x = torch.randn(3, next(module.parameters()).shape[1], dtype=torch.float64, requires_grad=True)
    sources = [x, *module.parameters()]
    expected = module(x)
    gradients = torch.autograd.grad(expected.square().sum(), sources)
    assert place(module, REFERENCE) == {"fused_swiglu" if name == "fused" else MLPS[name][1].operation: 1}
    found = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(torch.autograd.grad(found.square().sum(), sources), gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


WRONG = {
    "multiplier": halves(lambda gate, up: silu(1.001 * gate) * up),
    "clamp": halves(lambda gate, up: silu(gate) * up.clamp(-7, 7)),
    "cap": halves(lambda gate, up: silu(gate) * 25 * (up / 25).tanh()),
    "alpha": halves(lambda gate, up: gate * (1.702 * gate).sigmoid() * up),
    "plus one": halves(lambda gate, up: silu(gate) * (up + 1)),
    "interleaved": Fused(lambda both: silu(both[..., ::2]) * both[..., 1::2]),
    "dropout": halves(lambda gate, up: dropout(silu(gate) * up, 0.1)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mlp_is_left_alone(name: str) -> None:
    """It is left alone although its layers have the right sizes."""
    found = recognise(WRONG[name], {})
    assert isinstance(found, str) and found.startswith("differs from every swiglu and geglu by ")
    assert place(WRONG[name], REFERENCE) == {}


def test_an_mlp_with_another_activation_is_none() -> None:
    """There are many, such as those of vision towers: the log does not name them."""
    assert recognise(Squared(torch.nn.functional.gelu), {}) is None


class DropsOut(Named):
    """An MLP with dropout in a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[T, 16] to [T, 16]."""
        return self.w2(self.dropout(silu(self.w1(x)) * self.w3(x)))


class ScalesInTraining(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """[T, 16] to [T, 16]."""
        return plain(self, 2 * x if self.training else x) * (2.0 if self.training else 1.0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [DropsOut, lambda: ScalesInTraining(16)])
def test_a_module_that_works_otherwise_in_training_is_left_alone(kind: Callable[[], nn.Module], training: bool) -> None:
    """It is left alone in whatever mode it is found, and the mode stays."""
    module = kind().train(training)
    assert recognise(module, {}) == "differs between training and evaluation"
    assert {each.training for each in module.modules()} == {training}


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_an_activation_are_called(register: str) -> None:
    """The MLP is left alone, and equal ones without hooks are not; so is one whose hook comes later."""
    model, seen = nn.Sequential(mlp(hidden=16), mlp(hidden=16)), []
    getattr(model[1].act_fn, register)(lambda *given: seen.append(given))
    assert place(model, REFERENCE) == {"swiglu": 1}
    model(torch.randn(3, 16)).sum().backward()
    assert len(seen) == 1
    getattr(model[0].act_fn, register)(lambda *given: seen.append(given))
    model(torch.randn(3, 16)).sum().backward()
    assert len(seen) == 3


def test_the_check_takes_no_notice_of_defaults() -> None:
    """Loaders set the default device and dtype of new tensors."""
    norms, mlps = (list(cases.values()) for cases in (NORMS, MLPS))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            for module, expected in norms + mlps:
                assert recognise(module, {}) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_equal_modules_are_checked_once_and_others_apart() -> None:
    """The key has every attribute: another eps, another weight's size, another function; GELUs are equal."""
    known: dict[Any, Any] = {}
    norms = [LlamaRMSNorm(16), LlamaRMSNorm(16), LlamaRMSNorm(24), LlamaRMSNorm(16, eps=1e-3)]
    config = LlamaConfig(hidden_size=16, num_attention_heads=1, hidden_act="gelu_pytorch_tanh")
    mlps = [LlamaMLP(config), LlamaMLP(config), WRONG["clamp"], WRONG["cap"]]
    counts = []
    for module in norms + mlps:
        recognise(module, known)
        counts.append(len(known))
    assert counts == [1, 1, 2, 3, 4, 4, 5, 6]

"""Gated norms and ReLU squared in families with them, and when the norms of the heads and rope are one operation."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from tests import tiny
from tests.models import families, zoo
from tests.models.test_placement import counting_backend
from tests.models.zoo import SIZES
from unsloth_fast import backends
from unsloth_fast.models import place

pytestmark = pytest.mark.filterwarnings("ignore")

REFERENCE = backends.resolve("reference")


def _model(name: str, **config: Any) -> Any:
    model_class = getattr(t, f"{name}ForCausalLM", None)
    if model_class is None:
        pytest.skip(f"transformers {t.__version__} has no {name}ForCausalLM")
    return model_class(model_class.config_class(**SIZES | config))


# A model, and how many of its modules call one of these two operations.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "nemotron": (lambda: _model("Nemotron"), {"relu_squared": 2}),
    "arcee": (lambda: _model("Arcee"), {"relu_squared": 2}),
    "mamba2": (lambda: zoo.model("mamba2"), {"gated_rms_norm": 2}),
    "falcon_h1": (
        lambda: t.FalconH1ForCausalLM(
            t.FalconH1Config(**SIZES | zoo.MAMBA2, mamba_d_ssm=64, mamba_n_heads=4, mamba_rms_norm=True)
        ),
        {"gated_rms_norm": 2},
    ),
}
OPERATIONS = {name for _, counts in FAMILIES.values() for name in counts}


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def step(model: Any) -> tuple[float, dict[str, Tensor]]:
    """The model's own loss and every gradient."""
    tokens = torch.arange(3, 21).reshape(2, 9)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_untouched_models(family: str) -> None:
    """They are equal in float64, with every module placed that the operations compute."""
    model = build(family).double()
    with tiny.KeepFloat64():
        expected_loss, expected = step(model)
        placed = place(model, REFERENCE)
        loss, gradients = step(model)
    assert {name: count for name, count in placed.items() if name in OPERATIONS} == FAMILIES[family][1]
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-18, name


@pytest.mark.parametrize("family", ["nemotron", "falcon_h1"])
def test_the_fast_kernels_are_as_close_to_float64_as_the_model(family: str) -> None:
    """The error of all gradients together is at most twice the untouched float32 model's own."""
    with tiny.KeepFloat64():
        _, truth = step(build(family).double())
    model = build(family)
    _, own = step(model)
    place(model, backends.resolve("fast"))
    _, found = step(model)
    errors = [sum(float((one[name] - exact).norm()) ** 2 for name, exact in truth.items()) for one in (found, own)]
    assert 0 < errors[0] <= 4 * errors[1]


@pytest.mark.parametrize("setting", ["qk_norm_rope", "rms_norm", "rope"])
def test_a_setting_for_a_part_separates_the_operation(setting: str) -> None:
    """Each part then has the backend of its own setting."""
    model = tiny.model("qwen3")
    placed = place(model, backends.resolve(f"fast,{setting}=reference"))
    assert (placed["rms_norm"], placed["rope"]) == (9, 2) and "qk_norm_rope" not in placed
    expected = "unsloth_ref" if setting == "rms_norm" else "unsloth_fast"
    (function,) = (
        cell.cell_contents for cell in model.model.norm.forward.__func__.__closure__ if callable(cell.cell_contents)
    )
    assert inspect.getmodule(function).__name__.startswith(expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_a_replaced_or_hooked_norm_is_called(family: str) -> None:
    """The norms of the heads stay modules: hooks on them see the heads, and others may take their place."""
    model, tokens, seen = build_any(family), torch.arange(9)[None], []
    attentions = [layer.self_attn for layer in model.model.layers]
    attentions[0].q_norm.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    attentions[1].k_norm = Doubled(8)
    with tiny.KeepFloat64():
        expected = model(tokens).logits
    attentions[1].k_norm = type(attentions[1].q_norm)(8)
    place(model, REFERENCE)
    attentions[1].k_norm = Doubled(8)
    seen.clear()
    with tiny.KeepFloat64():
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-12, atol=1e-12)
    assert len(seen) == 1


def build_any(family: str) -> Any:
    return families.build(family) if family in families.FAMILIES else tiny.model(family).double()


class Doubled(nn.Module):
    """A module without a weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Between(t.models.qwen3.modeling_qwen3.Qwen3Attention):
    """Scales the queries between their norm and the rotation."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        """The rotated queries and keys."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        q = 2 * q
        q, k = t.models.qwen3.modeling_qwen3.apply_rotary_pos_emb(q, k, *position_embeddings)
        return q, k


class Kept(t.models.qwen3.modeling_qwen3.Qwen3Attention):
    """Uses the normalised heads beside the rotated ones."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        """The sums of rotated and normalised queries and keys."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        cos, sin = position_embeddings
        turned_q, turned_k = apply_rotary_pos_emb(q, k, cos, sin)
        return turned_q + q, turned_k + k


def test_norms_with_something_between_are_left_alone() -> None:
    """Only the norms are placed, for the rotation is no function of this file."""
    attention = Between(tiny.model("qwen3").config, 0)
    assert place(attention, REFERENCE) == {"rms_norm": 2}


def test_heads_that_are_used_before_the_rotation_too_are_normalised_apart() -> None:
    attention = Kept(tiny.model("qwen3").config, 0).double()
    x, angles = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 4).double().repeat(1, 1, 2)
    with tiny.KeepFloat64():
        expected = attention(x, (angles.cos(), angles.sin()), None)
    assert place(attention, REFERENCE) == {"rms_norm": 2, "rope": 1}
    torch.testing.assert_close(attention(x, (angles.cos(), angles.sin()), None), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma4, shared keys", {"qk_norm_rope": 6, "rope": 0, "rms_norm": 24}),  # the last two layers have no keys
        ("llama4", {"qk_norm_rope": 0, "rope": 1, "rms_norm": 7}),  # the second layer has no positions
    ],
)
def test_placed_attentions_call_the_operation(family: str, expected: dict[str, int]) -> None:
    """Once for queries and once for keys, where the family rotates them one by one."""
    calls: list[str] = []
    model = families.build(family)
    place(model, counting_backend(calls))
    model(torch.arange(9)[None])
    assert {name: calls.count(name) for name in expected} == expected


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_vision_tower_calls_rope(family: str) -> None:
    """Its patches have no batch; values and gradients are the untouched tower's in float64."""
    calls: list[str] = []
    tower = families.build(family).model.visual
    config = tower.config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches, grid = torch.randn(32, width, dtype=torch.float64), torch.tensor([[1, 4, 4], [1, 4, 4]])

    def run() -> tuple[Tensor, ...]:
        states = tower(patches, grid).last_hidden_state
        return states, *torch.autograd.grad(states.sin().sum(), list(tower.parameters()), allow_unused=True)

    with tiny.KeepFloat64():
        expected = run()
        place(tower, counting_backend(calls))
        found = run()
    assert calls.count("rope") == 1
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-9 * other.norm() + 1e-17

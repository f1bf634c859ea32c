"""What is drawn of a tiny model shows every part of it: factors, caps, groups, stored buffers, padding, evaluation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.laws import LAWS
from conformance.models.shrinking import tiny_config
from conformance.models.trial import ModelTrial
from tests.judge.model_trials import after_placing, broken, llama, trial_of
from unsloth_fast.models import head, mixers, mlp, packed, placement

pytestmark = pytest.mark.usefixtures("quiet_models")

CONV = {"layer_types": ["conv"], "num_hidden_layers": 1}
FIELDS: dict[str, dict[str, Any]] = {
    "granite": {"num_hidden_layers": 1},
    "gemma2": {"layer_types": ["full_attention"], "num_hidden_layers": 1},
    "gpt_oss": {"layer_types": ["full_attention"], "num_hidden_layers": 1},
    "deepseek_v3": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    "lfm2": CONV,
}


def small(name: str) -> ModelTrial:
    """A tiny model, still smaller."""
    return trial_of(name, **FIELDS[name])


@pytest.mark.parametrize(
    ("name", "field", "usual"),
    [
        ("granite", "residual_multiplier", 1.0),
        ("granite", "attention_multiplier", 1.0),
        ("granite", "logits_scaling", 1.0),
        ("falcon_h1", "embedding_multiplier", 1.0),
        ("falcon_h1", "ssm_multipliers", [1.0] * 5),
        ("falcon_h1", "mlp_multipliers", [1.0] * 2),
        ("falcon_h1", "mamba_n_groups", 1),
        ("nemotron_h", "n_groups", 1),
        ("zamba2", "mamba_ngroups", 1),
        ("glm4_moe", "routed_scaling_factor", 1.0),
        ("gemma2", "attn_logit_softcapping", 50.0),
        ("gpt_oss", "swiglu_limit", 7.0),
    ],
)
def test_a_factor_a_cap_or_a_group_is_not_one_that_nothing_shows(name: str, field: str, usual: Any) -> None:
    """And factors of one list differ."""
    found = getattr(tiny_config(name), field)
    assert found != usual
    assert not isinstance(found, list) or len(set(found)) == len(usual)


def test_steps_of_a_scan_meet_their_limits() -> None:
    assert tuple(tiny_config("nemotron_h").time_step_limit) == (0.05, 1.0)


def test_sizes_are_no_factors() -> None:
    assert tiny_config("lfm2").block_ffn_dim_multiplier == 1.0


def test_a_factor_of_the_residual_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(model: Any) -> None:
        for layer in model.model.layers:
            layer.residual_multiplier = 1.0

    after_placing(monkeypatch, drop)
    assert "the hidden states of model.layers.0" in broken("layers", small("granite"))


def test_a_factor_of_the_logits_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    own = head.logit_options
    monkeypatch.setattr(head, "logit_options", lambda *args: (own(*args) or {}) | {"logit_scale": 1.0})
    assert "in the loss" in broken("gradients", small("granite"))


@pytest.mark.parametrize("lost", ["scaling", "softcap"])
def test_a_scale_or_a_cap_of_the_attention_that_is_dropped(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = packed._attention
    for name in ("packed_sdpa", "packed_eager"):

        def planted(*args: Any, before: str = name.removeprefix("packed_"), **options: Any) -> Any:
            return own(*args, before=before, **options | ({lost: None} if args[4].dtype == torch.int32 else {}))

        monkeypatch.setitem(packed.ALL_ATTENTION_FUNCTIONS._global_mapping, name, planted)
    assert "the hidden states of model.layers.0" in broken("padding_free", small("gemma2"))


def test_a_limit_of_experts_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    own = placement.experts_forward
    monkeypatch.setattr(placement, "experts_forward", lambda found, kernels: own(replace(found, limit=None), kernels))
    assert "the hidden states of model.layers.0" in broken("layers", small("gpt_oss"))


def test_a_bias_of_a_router_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a buffer, which has no gradient."""

    def leave_out(model: Any) -> None:
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()

    after_placing(monkeypatch, leave_out)
    assert "the hidden states of model.layers.0" in broken("layers", small("deepseek_v3"))


def test_a_mixer_that_reads_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on the right comes after all that is read."""
    own: Callable[..., Any] = placement.mixer_forward

    def deaf(mixer: mixers.Mixer, kernels: Any) -> Callable[..., Tensor]:
        forward = own(mixer, kernels)

        def planted(self: nn.Module, hidden_states: Tensor, **options: Any) -> Any:
            return forward(self, hidden_states, **options | {"attention_mask": None})

        return planted

    assert LAWS["left_padded"].check(small("lfm2"))
    monkeypatch.setattr(placement, "mixer_forward", deaf)
    assert LAWS["gradients"].check(small("lfm2"))
    assert "the hidden states of model.layers.0" in broken("left_padded", small("lfm2"))


def test_a_fault_in_evaluation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = mlp._factors

    def planted(module: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
        gate, up = own(module, *args)
        return gate, up if module.training or up.dtype == torch.float64 else 1.01 * up

    monkeypatch.setattr(mlp, "_factors", planted)
    assert LAWS["gradients"].check(llama())
    assert "the hidden states of model.layers.0" in broken("evaluated", llama())

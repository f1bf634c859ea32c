"""One tiny model per family that people fine-tune, what is placed under it, and one step of such a model."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.models import zoo
from tests.models.custom import CustomConfig, CustomForCausalLM

# Experts by grouped products take no float64.
EXPERTS = {"experts_implementation": "eager", "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FOUR = EXPERTS | {"num_experts": 4}
LOCAL = EXPERTS | {"num_local_experts": 4}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
ROUTED |= {"first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
LATENT |= {"head_dim": 4, "num_key_value_heads": 4}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
SHARED = {"shared_expert_intermediate_size": 16}
CONV = {"layer_types": ["conv", "full_attention"]}
MAMBA = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_n_heads": 8}
NEMOTRON = {"mamba_head_dim": 8, "mamba_num_heads": 8, "ssm_state_size": 8, "n_groups": 1}
YARN = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
GEMMA4 = WINDOWS | {"global_head_dim": 16, "vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 8}
FUSED: dict[str, Any] = {"rotation": "qk_norm_rope"}
GEGLU = FUSED | {"gate": "geglu"}
CENTRED: dict[str, Any] = {"others": {"layer_norm": 3}}
SCAN: dict[str, Any] = {"packed": 1, "others": {"gated_rms_norm": 1, "causal_conv": 1, "mamba2_scan": 1}}
TWO_SCANS: dict[str, Any] = {"others": {"causal_conv": 2, "mamba2_scan": 2}}
MIXED: dict[str, Any] = {"packed": 1, "others": {"causal_conv": 1}}
MIXED_DELTA: dict[str, Any] = FUSED | {
    "packed": 1,
    "others": {"gated_rms_norm": 1, "causal_conv": 1, "gated_delta_rule": 1},
}
STATE = "its layers carry a state"
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """A family with a model of two layers.

    Attributes:
        model: its class; "" for `CustomForCausalLM`.
        config: of the model, or of its language model.
        norms, gated, rope, experts: how many norms, MLPs, attentions and blocks of experts get an operation.
        linear: how many layers get LoRA; None leaves LoRA out.
        vision: the config of its vision tower, if it has one.
        gate, rotation: the operations of the MLPs and of the attentions.
        others: how many modules get further operations.
        packed: how many attentions `packed_attention` gets, unless foreign.
        foreign: why packed batches are left to transformers; None if `packed_attention` gets them.
    """

    model: str
    config: dict[str, Any]
    norms: int
    gated: int
    rope: int = 2
    linear: int | None = None
    vision: dict[str, Any] | None = None
    gate: str = "swiglu"
    rotation: str = "rope"
    others: dict[str, int] = field(default_factory=dict)
    packed: int = 2
    foreign: str | None = None
    experts: int = 0

    @property
    def placed(self) -> Counter[str]:
        """What `place` returns, without LoRA."""
        own = {"rms_norm": self.norms, self.gate: self.gated, self.rotation: self.rope, "moe_mlp": self.experts}
        return +Counter(own | {"packed_attention": 0 if self.foreign else self.packed} | self.others)


# Those that people fine-tune, beside the ones of tests/tiny.py.
FAMILIES: dict[str, Family] = {
    "phi3": Family("Phi3ForCausalLM", {"sliding_window": 4}, 5, 2, linear=8, gate="fused_swiglu"),
    "olmo2": Family("Olmo2ForCausalLM", {}, 9, 2, linear=14),
    "olmo3": Family("Olmo3ForCausalLM", WINDOWS, 9, 2, linear=14),
    "granite": Family("GraniteForCausalLM", {"logits_scaling": 8.0, "residual_multiplier": 0.5}, 5, 2, linear=14),
    "granite4": Family(
        "GraniteMoeHybridForCausalLM",
        LOCAL | MAMBA | {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
        5,
        2,
        1,
        gate="fused_swiglu",
        experts=2,
        **SCAN,
    ),
    "cohere": Family("CohereForCausalLM", {"logit_scale": 0.25}, 0, 2, linear=14, **CENTRED),
    "cohere2": Family("Cohere2ForCausalLM", WINDOWS | {"logit_scale": 0.25}, 0, 2, linear=14, **CENTRED),
    "seed_oss": Family("SeedOssForCausalLM", {"residual_dropout": 0.0, "attention_dropout": 0.0}, 5, 2, linear=14),
    "smollm3": Family("SmolLM3ForCausalLM", {"no_rope_layers": [0, 1]}, 5, 2, linear=14),
    "glm4": Family("Glm4ForCausalLM", {}, 9, 2, linear=12, gate="fused_swiglu"),
    "glm4_moe": Family("Glm4MoeForCausalLM", ROUTED, 5, 2, experts=1, linear=8),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", ROUTED | LATENT, 9, 2, experts=1, linear=10),
    "glm5": Family(
        "GlmMoeDsaForCausalLM",
        ROUTED | LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
        9,
        2,
        4,
        foreign="GlmMoeDsaAttention changes its mask",
        experts=1,
        linear=16,
    ),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", ROUTED | LATENT, 9, 2, linear=10, experts=1),
    "deepseek_v4": Family("DeepseekV4ForCausalLM", ROUTED, 11, 0, 4, foreign=STATE, experts=2),
    "ministral": Family("MinistralForCausalLM", {"sliding_window": 4}, 5, 2, linear=14),
    "ministral3": Family("Ministral3ForCausalLM", {}, 5, 2, linear=14),
    "mistral4": Family("Mistral4ForCausalLM", ROUTED | LATENT | {"rope_parameters": YARN}, 9, 2, experts=1, linear=16),
    "hunyuan": Family("HunYuanDenseV1ForCausalLM", {}, 9, 2, linear=14),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", FOUR, 5, 0, linear=8, experts=2, **FUSED),
    "qwen3_next": Family("Qwen3NextForCausalLM", FOUR | DELTA | SHARED, 5, 2, 1, experts=2, **MIXED_DELTA),
    "qwen3_5": Family("Qwen3_5ForCausalLM", DELTA, 5, 2, 1, **MIXED_DELTA),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", FOUR | DELTA | SHARED, 5, 2, 1, experts=2, **MIXED_DELTA),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", MROPE, 8, 3, 3, 21, vision=VISION),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        MROPE,
        5,
        2,
        vision=VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        others={"rope": 1},
        **FUSED,
        linear=22,
    ),
    "gemma4": Family("Gemma4ForCausalLM", GEMMA4 | {"attention_k_eq_v": True}, 14, 2, linear=18, **GEGLU),
    "gemma4, shared keys": Family(
        "Gemma4ForCausalLM",
        GEMMA4
        | {"num_hidden_layers": 4, "layer_types": 2 * WINDOWS["layer_types"], "num_kv_shared_layers": 2}
        | {"use_double_wide_mlp": True, "final_logit_softcapping": 3.0},
        24,
        4,
        4,
        linear=33,
        packed=4,
        **GEGLU,
    ),
    "gemma4, experts": Family(
        "Gemma4ForCausalLM",
        GEMMA4 | EXPERTS | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
        22,
        2,
        linear=21,
        experts=2,
        **GEGLU,
    ),
    "gpt_oss": Family("GptOssForCausalLM", LOCAL | WINDOWS, 5, 0, linear=8, experts=2),
    "lfm2": Family("Lfm2ForCausalLM", CONV, 5, 2, 1, **FUSED, **MIXED),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM", FOUR | CONV | {"num_dense_layers": 1}, 5, 1, 1, experts=1, **FUSED, **MIXED, linear=9
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        NEMOTRON | {"layers_block_type": ["mamba", "attention"]},
        3,
        0,
        0,
        **SCAN,
    ),
    "falcon_h1": Family("FalconH1ForCausalLM", MAMBA | {"mamba_d_ssm": 64}, 5, 2, **TWO_SCANS),
    "muse_glimmer": Family("MuseGlimmerForConditionalGeneration", {}, 13, 2, 3, 26, vision=zoo.VISION),
    "llama4": Family(
        "Llama4ForCausalLM",
        LOCAL | {"no_rope_layers": [1, 0], "floor_scale": 2, "attn_temperature_tuning": True},
        6,
        2,
        linear=14,
        foreign="its masks: create_chunked_causal_mask",
        experts=2,
    ),
    "mixtral": Family("MixtralForCausalLM", LOCAL, 5, 0, experts=2, linear=8),
    "ernie4_5": Family("Ernie4_5ForCausalLM", {}, 5, 2, linear=14),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM", EXPERTS | {"moe_num_experts": 4, "moe_k": 2}, 5, 2, experts=1, linear=8
    ),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", LOCAL | {"rotary_dim": 4}, 9, 0, experts=2, linear=8),
    "custom": Family("", {}, 5, 2, 0, linear=6, foreign="?"),
}


def build(name: str) -> Any:
    """The model in float64, with random norm weights; skips what the installed transformers lacks."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    if not family.model:
        model = CustomForCausalLM(CustomConfig())
    elif (model_class := getattr(transformers, family.model, None)) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}")
    elif family.vision is not None:
        config = {"text_config": tiny.SIZES | family.config, "vision_config": family.vision}
        model = model_class(model_class.config_class(**config))
    else:
        model = model_class(model_class.config_class(**tiny.SIZES | family.config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which about a third are no targets."""
    tokens = torch.randint(3, len(tiny.WORDS), (2, 9))
    return tokens, tokens.masked_fill(torch.rand(2, 9) < 0.3, -100)


def step(model: Any, tokens: torch.Tensor, labels: torch.Tensor, **options: Any) -> tuple[float, dict[str, Any]]:
    """The loss and every gradient."""
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=labels, use_cache=False, **options).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> None:
    """Demand equal losses and gradients of two steps, up to the rounding of float64."""
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, gradient in expected[1].items():
        assert gradient.any()
        assert (found[1][name] - gradient).norm() <= 1e-9 * gradient.norm(), name


def error(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The norm of the errors of all gradients together."""
    return sum((gradients[name] - gradient).norm().item() ** 2 for name, gradient in truth.items()) ** 0.5

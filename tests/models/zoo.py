"""Tiny models of families beyond those of tests/tiny.py: experts, Mamba layers, vision towers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from transformers import PreTrainedModel

from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": len(tiny.WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MAMBA2: dict[str, Any] = {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
VISION |= {"hidden_size": 32, "intermediate_size": 64}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


def _granite() -> PreTrainedModel:
    layers = {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, "mamba_n_heads": 8}
    sizes = SIZES | MAMBA2 | layers | {"num_local_experts": 4, "num_experts_per_tok": 2}
    return t.GraniteMoeHybridForCausalLM(t.GraniteMoeHybridConfig(**sizes))


def _gemma3n() -> PreTrainedModel:
    extra = {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    rest = {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]}
    return t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**SIZES | WINDOWS | extra | rest))


def _gemma3() -> PreTrainedModel:
    config = t.Gemma3Config(text_config=SIZES | WINDOWS, vision_config=VISION, mm_tokens_per_image=4)
    return t.Gemma3ForConditionalGeneration(config)


def _mistral3() -> PreTrainedModel:
    text, vision = SIZES | {"model_type": "mistral"}, VISION | {"model_type": "pixtral", "head_dim": 16}
    return t.Mistral3ForConditionalGeneration(t.Mistral3Config(text_config=text, vision_config=vision))


def _qwen2_5_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config = t.Qwen2_5_VLConfig(text_config=SIZES | {"rope_parameters": rope}, vision_config=vision)
    return t.Qwen2_5_VLForConditionalGeneration(config)


def _falcon_h1() -> PreTrainedModel:
    return t.FalconH1ForCausalLM(t.FalconH1Config(**SIZES | MAMBA2, mamba_d_ssm=64, mamba_n_heads=4))


def _mamba2() -> PreTrainedModel:
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    return t.Mamba2ForCausalLM(t.Mamba2Config(**sizes, num_heads=8, head_dim=16, state_size=16, n_groups=1))


def _jamba() -> PreTrainedModel:
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return t.JambaForCausalLM(t.JambaConfig(**SIZES, **layers, num_experts=4, num_experts_per_tok=2))


def _qwen2_moe() -> PreTrainedModel:
    config = t.Qwen2MoeConfig(**SIZES, **EXPERTS, num_experts=4, shared_expert_intermediate_size=32)
    return t.Qwen2MoeForCausalLM(config)


def _gpt_oss() -> PreTrainedModel:
    config = t.GptOssConfig(**SIZES | WINDOWS, num_local_experts=4, num_experts_per_tok=2)
    return t.GptOssForCausalLM(config)


ZOO: dict[str, Callable[[], PreTrainedModel]] = {
    "granitemoehybrid": _granite,
    "falcon_h1": _falcon_h1,
    "mamba2": _mamba2,
    "jamba": _jamba,
    "gemma3n": _gemma3n,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4)),
    "gpt_oss": _gpt_oss,
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**SIZES)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=len(tiny.WORDS), n_embd=64, n_layer=1, n_head=4)),
}

# Families with a load-balancing loss; transformers 5.17 does not return what Granite's routers computed.
BALANCED = ["qwen3_moe", "gpt_oss", "qwen2_moe"]
BALANCED += ["granitemoehybrid"] * ("router_logits" in (t.GraniteMoeHybridForCausalLM._can_record_outputs or ()))


def model(name: str) -> Any:
    torch.manual_seed(0)
    return ZOO[name]()


def empty(name: str) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return ZOO[name]()


def folder(path: Path, name: str) -> str:
    """Save a model and its tokenizer; return the folder."""
    model(name).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)

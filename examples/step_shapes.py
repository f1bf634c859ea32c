"""The models that `step_benchmark.py` can train: sizes of published ones, some with fewer layers or experts."""

from dataclasses import dataclass
from typing import Any

SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = SPLIT[:4]


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        model_type: of transformers.
        fields: of its configuration.
        linear: the linear layers that get LoRA.
    """

    model_type: str
    fields: dict[str, Any]
    linear: tuple[str, ...] = SPLIT


SHAPES = {
    "llama-3.2-1b": Shape("llama", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rope_theta": 500000.0,
    }),
    "llama-3.1-8b-half": Shape("llama", {  # 16 of 32 layers
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    }),
    "qwen3-1.7b": Shape("qwen3", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    }),
    "gemma-3-1b": Shape("gemma3_text", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "max_position_embeddings": 32768,
    }),
    "phi-3-half": Shape("phi3", {  # 16 of 32 layers
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    }, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "qwen3-moe": Shape("qwen3_moe", {  # 12 of 48 layers, 64 of 128 experts
        "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
    }, ATTENTION),
    "gpt-oss": Shape("gpt_oss", {  # 12 of 24 layers
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 12,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128,
    }, ATTENTION),
    "qwen3.5": Shape("qwen3_5_text", {  # 12 of 24 layers
        "vocab_size": 248320, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_value_heads": 16,
        "tie_word_embeddings": True,
    }),
    "gemma-4": Shape("gemma4_text", {  # 12 of 30 layers
        "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 512,
    }),
    "lfm2-1.2b": Shape("lfm2", {
        "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 12288, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "conv_L_cache": 3,
        "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
    }, ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj", "w1", "w2", "w3")),
    "granite-4-h-tiny": Shape("granitemoehybrid", {  # 10 of 40 layers
        "vocab_size": 100352, "hidden_size": 1536, "intermediate_size": 512, "shared_intermediate_size": 1024,
        "num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64,
        "num_experts_per_tok": 6, "mamba_n_heads": 48, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_head": 64,
        "layer_types": ["attention" if i == 5 else "mamba" for i in range(10)], "position_embedding_type": "nope",
        "tie_word_embeddings": True,
    }, (*ATTENTION, "in_proj", "out_proj", "input_linear", "output_linear")),
    "glm-4-9b": Shape("glm4", {  # 10 of 40 layers
        "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 10,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    }, (*ATTENTION, "gate_up_proj", "down_proj")),
    "olmo-3-7b": Shape("olmo3", {  # 8 of 32 layers
        "vocab_size": 100278, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8,
        "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 4096,
    }),
    "moonlight-16b": Shape("deepseek_v3", {  # 6 of 27 layers
        "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
        "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "max_position_embeddings": 8192,
    }, ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
}  # fmt: skip

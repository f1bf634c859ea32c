"""How does an architecture's configuration become that of a tiny model, with every kind of its layers?"""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

TOKENS = 48  # of the vocabulary; the first three are special
HIDDEN, FEED_FORWARD, HEADS, KEY_HEADS, HEAD = 32, 48, 4, 2, 8
MOST_LAYERS = 4
EXPERTS, CHOSEN, RANK, STATE, WINDOW, POSITIONS = 4, 2, 8, 8, 4, 128

# What transformers' configurations call the same size. A name that a configuration does not have is left out, and so
# is one whose value is None or 0: the architecture then has no such part.
_NAMES = (
    (TOKENS, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
    (TOKENS, "encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base"),
    (HIDDEN, "hidden_size d_model n_embd embedding_dim attention_hidden_size lru_width word_embed_proj_dim"),
    (HIDDEN, "pronunciation_embed_dim shape_embed_dim adapter_in_dim adapter_out_dim adapter_input_size"),
    (HIDDEN, "embedding_size input_embedding_size output_embedding_size emb_dim mamba_d_ssm hidden_size_global"),
    (HIDDEN, "embed_dim out_hidden_size text_hidden_size codebook_dim projection_dim projector_hidden_size"),
    (FEED_FORWARD, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff n_inner"),
    (FEED_FORWARD, "intermediate_size_mlp dense_intermediate_size d_inner feed_forward_size"),
    (FEED_FORWARD // 2, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (FEED_FORWARD // 2, "expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (HEADS, "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    (HEADS, "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads index_n_heads"),
    (KEY_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads n_mamba_heads"),
    (KEY_HEADS, "num_query_groups n_groups mamba_n_groups mamba_ngroups"),
    (HEAD, "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim swa_head_dim linear_key_head_dim dim_head d_head"),
    (HEAD, "linear_value_head_dim linear_head_dim index_head_dim rotary_dim attention_head_size global_head_dim"),
    (HEAD, "kv_channels"),
    (2 * HEAD, "qk_head_dim mamba_d_head mamba_head_dim mamba_headdim"),
    (2 * HEAD, "query_pre_attn_scalar"),  # with HEAD the scale of the attention would be the usual one
    (RANK, "q_lora_rank kv_lora_rank o_lora_rank time_step_rank mamba_dt_rank hc_lowrank laurel_rank d_rel"),
    (RANK, "gated_norm_rank loop_gate_rank adapter_rank router_hidden_size hidden_size_per_layer_input ple_embed_dim"),
    (STATE, "state_size ssm_state_size mamba_d_state chunk_size mamba_chunk_size"),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts index_topk zero_expert_num rel_extent"),
    (CHOSEN, "num_experts_per_tok moe_topk num_experts_per_token moe_k"),
    (1, "n_group topk_group num_expert_group o_groups n_shared_experts"),
    (1, "num_shared_experts moe_num_shared_experts encoder_layers num_encoder_layers first_k_dense_replace"),
    (WINDOW, "sliding_window sliding_window_size window_size local_attention attention_window_size"),
    (WINDOW, "attention_chunk_size keep_window_size local_attention_window_len"),
    # Positions from which on something changes, and the keys of a block that is chosen as a whole.
    (WINDOW, "floor_scale log_scaling_n_floor index_block_size index_kpool"),
    (1, "index_topk_blocks"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"),
    (POSITIONS, "max_target_positions max_source_positions original_max_position_embeddings"),
)
_SIZES = {name: size for size, names in _NAMES for name in names.split()}
_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "depth",
)
# Sizes that no architecture can do without, although the default of some is None.
_NEEDED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
_EACH = "per_layer_config"  # fields of single layers that differ, by their number
_DENSE = "mlp_only_layers"  # the numbers of layers without experts
# Factors that are 1 by default and caps that a tiny model does not reach: without these values they would not show.
_FACTOR = re.compile(r".*(?<!dim)_(multipliers?|scaling|scaling_factor)|route_scale")
_CAP = re.compile(r".*(soft_?cap(ping)?|clip_threshold)|swiglu_limit|clip_qkv")
_FACTORS, _CAPPED, _STEPS = (0.75, 1.25, 0.875, 1.125, 0.625), 0.5, (0.05, 1.0)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def tiny_config(model_type: str, **given: Any) -> PreTrainedConfig:
    """The configuration of a tiny model of an architecture, with at least one layer of each kind.

    Args:
        model_type: one of transformers' names, such as "llama".
        **given: fields to set beside those that are shrunk.
    """
    config_class = CONFIG_MAPPING[model_type]
    fields = _shrunk(config_class()) | _ADAPTED.get(model_type, {}) | given
    return config_class(**copy.deepcopy(fields))  # some classes change what they are given


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that are smaller in a tiny model, and those of the configurations inside it."""
    fields: dict[str, Any] = {}
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            fields[name] = inner.to_dict() | _shrunk(inner) | _ADAPTED.get(inner.model_type, {})
    values = config.to_dict()
    depth = next((name for name in _DEPTHS if isinstance(values.get(name), int)), None)
    layers = _layers(values, values[depth]) if depth else []
    for name, value in values.items():
        if name == depth:
            fields[name] = len(layers)
        elif name in _SIZES and ((isinstance(value, int) and value) or (value is None and name in _NEEDED)):
            fields[name] = _SIZES[name]
        elif name in _SIZES and isinstance(value, list) and all(isinstance(each, int) for each in value):
            of_layers = depth and len(value) == values[depth]  # otherwise of experts of several kinds
            fields[name] = [_SIZES[name]] * (len(layers) if of_layers else len(value))
        elif name.endswith("feature_layer") and isinstance(value, list):
            fields[name] = [-1, -2][: len(value)]  # the layers of another configuration are fewer now
        elif name in _SPECIAL:
            fields[name] = _SPECIAL[name]
        elif (telling := _telling(name, value)) is not None:
            fields[name] = telling
        elif depth and isinstance(value, list) and len(value) == values[depth]:
            fields[name] = [_SIZES.get(name, value[layer]) for layer in layers]
        elif name == _DENSE:
            fields[name] = [layers.index(layer) for layer in value or () if layer in layers]
        elif isinstance(value, dict) and value.get("llama_4_scaling_beta"):
            fields[name] = value | {"original_max_position_embeddings": WINDOW}  # the factor of queries by position
        elif isinstance(value, dict) and value.get("mrope_section"):
            fields[name] = value | {"mrope_section": _sections(value.get("partial_rotary_factor", 1.0))}
    if fields.get("kv_lora_rank"):  # each head has keys of its own
        fields["num_key_value_heads"] = HEADS
    if _EACH in values:
        fields[_EACH] = {
            layers.index(layer): {n: _in_proportion(one, values.get(n), fields.get(n)) for n, one in own.items()}
            for layer, own in _each(values).items()
            if layer in layers
        }
    return fields


def _telling(name: str, value: Any) -> Any:
    """The value of a factor or cap with which a model that ignores it computes something else; None for the given."""
    if _FACTOR.fullmatch(name) and value in (1.0, [1.0] * len(_FACTORS), [1.0] * 2) and not isinstance(value, int):
        return [*_FACTORS[: len(value)]] if isinstance(value, list) else _FACTORS[0]
    if name == "time_step_limit":
        return _STEPS
    return _CAPPED if _CAP.fullmatch(name) and isinstance(value, float) and value else None


def _sections(rotated: float) -> list[int]:
    """How many pairs of columns the three axes of positions have, of the share of a head that is rotated."""
    pairs = int(rotated * HEAD) // 2
    return [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]


def _each(values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The fields in which single layers differ."""
    return {int(layer): own for layer, own in (values.get(_EACH) or {}).items()}


def _in_proportion(value: Any, usual: Any, tiny: Any) -> Any:
    """A size of one layer, which differs from the tiny one of the others as its value does from the usual one."""
    if not all(isinstance(size, int) and size for size in (value, usual, tiny)):
        return value
    return max(1, tiny * value // usual)


def _layers(values: Mapping[str, Any], depth: int) -> list[int]:
    """The first layer of each kind, at least two and at most MOST_LAYERS of them, in order."""
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == depth]
    lists.append([(_each(values).get(layer), layer in (values.get(_DENSE) or ())) for layer in range(depth)])
    kinds = [tuple(map(str, kind)) for kind in zip(*lists, strict=True)] or [()] * depth
    first = sorted({kind: layer for layer, kind in reversed([*enumerate(kinds)])}.values())
    others = (layer for layer in range(depth) if layer not in first)
    return sorted([*first, *_take(others, 2 - len(first))])[:MOST_LAYERS]


def _take(values: Iterable[int], count: int) -> list[int]:
    return [value for value, _ in zip(values, range(count), strict=False)]


_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = _PLAIN | {"mrope_section": _sections(1.0)}
_CONV = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
# Where fields depend on each other in ways that their names do not tell, or where the default has one kind of layer.
_ADAPTED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _PLAIN, "sliding_attention": _PLAIN}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": KEY_HEADS, "clip_qkv": 8.0}},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
        "num_hidden_layers": 3,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_text": {"head_dim": 12 + HEAD},  # of the sliding layers, with rope and without
    "ernie4_5_vl_moe_text": {"rope_parameters": _PLAIN | {"mrope_section": [1, 1, 2]}},  # height, width, time
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * MOST_LAYERS},
    "glm4v_text": {"rope_parameters": _SECTIONS},
    "glm4v_moe_text": {"rope_parameters": _PLAIN | {"partial_rotary_factor": 0.5, "mrope_section": _sections(0.5)}},
    "glm_ocr_text": {"rope_parameters": _SECTIONS},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_vl_text": {"rope_parameters": _SECTIONS},
    "inkling2_loop_text": {  # the two layers in the middle are passed twice
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _CONV,
    "lfm2_moe": _CONV | {"num_dense_layers": 1},
    "mamba2": {"num_heads": HEADS, "head_dim": 2 * HIDDEN // HEADS},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "num_hidden_layers": 2},
    "muse_glimmer": {"projector_hidden_size": HIDDEN, "out_hidden_size": 4 * HIDDEN},
    "mistral4": {"head_dim": 2 * HEAD},  # with rope and without
    "paddleocr_vl_text": {"rope_parameters": _SECTIONS},
    "qwen2_vl_text": {"rope_parameters": _SECTIONS},
    "qwen2_5_vl_text": {"rope_parameters": _SECTIONS},
    "qwen3_vl_text": {"rope_parameters": _SECTIONS},
    "qwen3_vl_moe_text": {"rope_parameters": _SECTIONS},
    "qwen4_exp_text": {
        "indexer_n_heads": KEY_HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},  # the third has an attention
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS,
    },
    "zamba2": {"n_mamba_heads": HEADS, "attention_hidden_size": 2 * HIDDEN},
    "zaya": {"num_experts_per_tok": 1},
}

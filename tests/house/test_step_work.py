"""The work of the step benchmark: what it counts is what PyTorch counts, and idle time is what no kernel covers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from examples import step_work

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOKENS = 24


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora", "experts"])
def test_the_products_are_those_that_pytorch_counts(mode: str, tied: bool) -> None:
    """PyTorch counts the whole square of queries and keys; a document of one token per row leaves the weights alone."""
    config = Qwen3MoeConfig(**SIZES, **EXPERTS) if mode == "experts" else LlamaConfig(**SIZES)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    if mode == "lora":
        targets = ["q_proj", "o_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=targets))
        model.enable_input_require_grads()
    ids = torch.randint(96, (TOKENS, 1))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = counter.get_total_flops()
    if mode != "lora":  # the first layer's input
        assert any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    angles = config.head_dim  # transformers 5.17 computes those of rope as a product: 2 for each pair of columns
    assert step_work.operations(model, [1], TOKENS) == pytest.approx(expected, rel=0, abs=angles)


def test_a_window_and_a_recurrent_layer_have_fewer_pairs() -> None:
    config = LlamaConfig(**SIZES)
    model = AutoModelForCausalLM.from_config(config)
    per_pair = 12 * 4 * 16

    def attention(lengths: list[int]) -> float:
        return step_work.operations(model, lengths, sum(lengths)) - sum(lengths) * weights

    weights = step_work.operations(model, [1], 1) - 2 * per_pair
    assert attention([5, 2]) == pytest.approx(2 * per_pair * (15 + 3))
    for kind in ("linear_attention", "conv", "mamba"):
        config.layer_types, config.sliding_window = ["sliding_attention", kind], 2
        assert attention([5, 2]) == pytest.approx(per_pair * (1 + 2 * 4 + 3))


@pytest.mark.parametrize(
    ("intervals", "idle"),
    [([], 1.0), ([(0, 4)], 0.0), ([(1, 2), (1.5, 2), (3, 3.5)], 0.625), ([(0, 3), (1, 2)], 0.25), ([(0, 9)], 0.0)],
)
def test_overlapping_kernels_are_busy_once(intervals: list[tuple[float, float]], idle: float) -> None:
    assert step_work.idle_share(intervals, 4) == pytest.approx(idle)

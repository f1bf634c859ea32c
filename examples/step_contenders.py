"""The trainers that `step_benchmark.py` compares, each built as its users build it, on one shape and one data set."""

from itertools import pairwise
from typing import Any

ROWS, LENGTH, RANK = 8, 2048, 16
SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTENDERS = {
    "trl": "TRL, attention under a dense mask",
    "varlen": "TRL, attention by document",
    "liger-varlen": "TRL with Liger, attention by document",
    "unsloth": "Unsloth",
    "unsloth-4bit": "Unsloth, 4-bit weights",
    "reference": "this trainer on the reference",
    "fast": "this trainer",
    "fast-4bit": "this trainer, 4-bit weights",
}


def documents(steps: int) -> Any:
    """Enough documents for the steps: a Dataset of token ids, of log-normal lengths as text has them."""
    import numpy
    from datasets import Dataset

    draw = numpy.random.default_rng(0)
    lengths = numpy.clip(draw.lognormal(5.6, 0.9, size=steps * ROWS * LENGTH // 250).astype(int), 8, LENGTH)
    # A skewed distribution of tokens, so that there is something to learn.
    tokens = (4 + draw.geometric(1e-3, lengths.sum()) % (SHAPE["vocab_size"] - 4)).tolist()
    starts = [0, *lengths.cumsum().tolist()]
    return Dataset.from_dict({"input_ids": [tokens[a:b] for a, b in pairwise(starts)]})


def options(folder: str, steps: int) -> dict[str, Any]:
    """The arguments that all trainers share."""
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": ROWS, "packing": True,
        "max_length": LENGTH, "learning_rate": 2e-4, "lr_scheduler_type": "constant", "bf16": True,
        "optim": "adamw_torch_fused", "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0, "seed": 0,
    }  # fmt: skip


def build(contender: str, model_path: str, folder: str, steps: int) -> Any:
    """Build the trainer of a contender. It must be the first to import trl: unsloth patches what is imported later."""
    kind = contender.partition("-")[0]
    builders = {"unsloth": unsloth_trainer, "fast": our_trainer, "reference": our_trainer}
    return builders.get(kind, trl_trainer)(contender, model_path, folder, steps)


def varlen_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **keywords: Any
) -> tuple[Any, None]:
    """PyTorch's own attention over the documents of a row, with the signature that transformers calls."""
    from torch.nn.attention.varlen import varlen_attn

    def flat(heads: Any) -> Any:
        return heads.transpose(1, 2).flatten(0, 1)

    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bounds, longest = keywords["cu_seq_lens_q"], keywords["max_length_q"]
    attended = varlen_attn(flat(query), flat(key), flat(value), bounds, bounds, longest, longest, window_size=(-1, 0))
    return attended.unflatten(0, (query.shape[0], -1)), None


def trl_trainer(contender: str, model_path: str, folder: str, steps: int) -> Any:
    """TRL's own trainer, with or without liger."""
    import torch
    from peft import LoraConfig
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    if "varlen" in contender:
        AttentionInterface.register("varlen", varlen_attention)
        AttentionMaskInterface.register("varlen", lambda *_, **__: None)
    attention = "varlen" if "varlen" in contender else "sdpa"
    load = AutoModelForCausalLM.from_pretrained
    model = load(model_path, dtype=torch.bfloat16, attn_implementation=attention, device_map={"": 0})
    args = SFTConfig(**options(folder, steps), use_liger_kernel="liger" in contender)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return SFTTrainer(model, args, train_dataset=documents(steps), processing_class=tokenizer, peft_config=lora)


def unsloth_trainer(contender: str, model_path: str, folder: str, steps: int) -> Any:
    """Unsloth's patched trainer."""
    from unsloth import FastLanguageModel  # isort: skip  # before trl, which it patches
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = with_lora(FastLanguageModel, contender, model_path)
    args = SFTConfig(**options(folder, steps))
    return SFTTrainer(model, args, train_dataset=documents(steps), processing_class=tokenizer)


def our_trainer(contender: str, model_path: str, folder: str, steps: int) -> Any:
    """This project's trainer."""
    from unsloth_fast import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

    backend = contender.partition("-")[0]
    model, tokenizer = with_lora(FastLanguageModel, contender, model_path, backend=backend)
    args = UnslothTrainingArguments(**options(folder, steps), backend=backend)
    return UnslothTrainer(model, args, train_dataset=documents(steps), processing_class=tokenizer)


def with_lora(loader: Any, contender: str, model_path: str, **keywords: Any) -> tuple[Any, Any]:
    """The model with LoRA on its linear layers, and its tokenizer, by Unsloth's loader or by ours."""
    in_4bit = contender.endswith("4bit")
    model, tokenizer = loader.from_pretrained(model_path, max_seq_length=LENGTH, load_in_4bit=in_4bit, **keywords)
    lora = {"r": RANK, "lora_alpha": RANK, "target_modules": LINEAR, "use_gradient_checkpointing": False}
    return loader.get_peft_model(model, **lora), tokenizer

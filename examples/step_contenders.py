"""The trainers that `step_benchmark.py` compares, each built as its users build it, on one model and one data set."""

import os
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from step_shapes import SHAPES, Shape

RANK = 16
MODES = {
    "lora": "LoRA on the linear layers that step_shapes.py names",
    "embed": "the same, and embed_tokens and lm_head in full",
    "gc": "the same, with gradient checkpointing",
    "full": "all weights",
}
CONTENDERS = {
    "trl": "TRL, attention under a dense mask",
    "varlen": "TRL, attention by document",
    "liger-varlen": "TRL with Liger, attention by document",
    "unsloth": "Unsloth",
    "unsloth-4bit": "Unsloth, 4-bit weights",
    "reference": "this trainer on the reference",
    "fast": "this trainer",
    "fast-4bit": "this trainer, 4-bit weights",
    "fast-fp8": "this trainer, float8 weights",
}


@dataclass(frozen=True)
class Job:
    """What every contender trains.

    Attributes:
        model: a name of `SHAPES`.
        path: the folder of the model.
        rows: per step and GPU.
        length: of a row, in tokens.
        mode: a name of `MODES`.
        steps: number of optimizer steps.
        gpus: processes, each with a GPU and rows of its own.
    """

    model: str
    path: str
    rows: int
    length: int
    mode: str
    steps: int
    gpus: int

    @property
    def shape(self) -> Shape:
        """The model's sizes and its linear layers."""
        return SHAPES[self.model]

    @property
    def tokens(self) -> int:
        """The tokens of a step, on all GPUs."""
        return self.gpus * self.rows * self.length


def lengths(job: Job) -> list[int]:
    """The lengths of enough documents for the steps: log-normal, as those of text."""
    import numpy

    count = job.steps * job.tokens // 250
    drawn = numpy.random.default_rng(0).lognormal(5.6, 0.9, size=count)
    return numpy.clip(drawn.astype(int), 8, job.length).tolist()


def documents(job: Job) -> Any:
    """The documents: a Dataset of token ids."""
    import numpy
    from datasets import Dataset

    starts = [0, *accumulate(lengths(job))]
    # A skewed distribution of tokens, so that there is something to learn.
    drawn = numpy.random.default_rng(1).geometric(1e-3, starts[-1])
    tokens = (4 + drawn % (job.shape.fields["vocab_size"] - 4)).tolist()
    return Dataset.from_dict({"input_ids": [tokens[a:b] for a, b in pairwise(starts)]})


def options(job: Job, folder: str) -> dict[str, Any]:
    """The arguments that all trainers share."""
    return {
        "output_dir": folder, "max_steps": job.steps, "per_device_train_batch_size": job.rows, "packing": True,
        "max_length": job.length, "learning_rate": 2e-4, "lr_scheduler_type": "constant", "bf16": True,
        "optim": "adamw_torch_fused", "gradient_checkpointing": job.mode == "gc", "logging_steps": 5,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0, "seed": 0,
    }  # fmt: skip


def build(contender: str, job: Job, folder: str) -> Any:
    """Build the trainer of a contender. It must be the first to import trl: unsloth patches what is imported later."""
    kind = contender.partition("-")[0]
    builders = {"unsloth": unsloth_trainer, "fast": our_trainer, "reference": our_trainer}
    return builders.get(kind, trl_trainer)(contender, job, folder)


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
    window = (keywords.get("sliding_window") or 0) - 1, 0  # keys before and after a query; -1: all
    attended = varlen_attn(flat(query), flat(key), flat(value), bounds, bounds, longest, longest, window_size=window)
    return attended.unflatten(0, (query.shape[0], -1)), None


def trl_trainer(contender: str, job: Job, folder: str) -> Any:
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
    device = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model = load(job.path, dtype=torch.bfloat16, attn_implementation=attention, device_map=device)
    args = SFTConfig(**options(job, folder), use_liger_kernel="liger" in contender)
    whole = ["embed_tokens", "lm_head"] if job.mode == "embed" else None
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(job.shape.linear), modules_to_save=whole)
    peft_config = None if job.mode == "full" else lora
    tokenizer = AutoTokenizer.from_pretrained(job.path)
    return SFTTrainer(model, args, train_dataset=documents(job), processing_class=tokenizer, peft_config=peft_config)


def unsloth_trainer(contender: str, job: Job, folder: str) -> Any:
    """Unsloth's patched trainer."""
    from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

    return loaded_trainer(FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, contender, job, folder)


def our_trainer(contender: str, job: Job, folder: str) -> Any:
    """This project's trainer."""
    from unsloth_fast import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

    classes = (FastLanguageModel, UnslothTrainer, UnslothTrainingArguments)
    return loaded_trainer(*classes, contender, job, folder, backend=contender.partition("-")[0])


def loaded_trainer(
    loader: Any, trainer: Any, arguments: Any, contender: str, job: Job, folder: str, **backend: str
) -> Any:
    """A trainer with Unsloth's interface: Unsloth's own, or this project's."""
    full, checkpointing = job.mode == "full", "unsloth" if job.mode == "gc" else False
    bits = {f"load_in_{name}": True for name in ("4bit", "fp8") if contender.endswith(name)}
    weights = {"load_in_4bit": False, **bits, "full_finetuning": full}
    model, tokenizer = loader.from_pretrained(job.path, max_seq_length=job.length, **weights, **backend)
    if not full:
        targets = [*job.shape.linear, *(("embed_tokens", "lm_head") if job.mode == "embed" else ())]
        lora = {"r": RANK, "lora_alpha": RANK, "use_gradient_checkpointing": checkpointing}
        model = loader.get_peft_model(model, target_modules=targets, **lora)
    rate = {"embedding_learning_rate": 2e-5} if job.mode == "embed" else {}
    args = arguments(**options(job, folder), **rate, **backend)
    return trainer(model=model, args=args, train_dataset=documents(job), processing_class=tokenizer)

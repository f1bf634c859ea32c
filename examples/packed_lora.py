"""Time a packed LoRA step of this trainer beside trl, liger and unsloth on one GPU.

    python examples/packed_lora.py [--who NAME ...] [--steps N] [--out DIR] [--profile]

One model shape (Llama 3.2 1B, random weights), LoRA of rank 16 on every linear layer, bfloat16, AdamW, 8 rows of 2048
tokens a step, no gradient checkpointing. The rows are packed from documents whose lengths are distributed as those of
text: log-normal, most of a few hundred tokens, a few that fill a row. Each contender has its own process, loads the
same files, and sees the same documents. Shown: tokens per second (median step), peak memory, and the loss of each step,
which tells whether they train the same thing. --profile also shows where the time goes, by kernel.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

ROWS, LENGTH, RANK = 8, 2048, 16
SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHO = {
    "trl": "trl, attention by PyTorch under a dense mask",
    "varlen": "trl, attention document by document",
    "liger-varlen": "trl with liger, attention document by document",
    "unsloth": "unsloth",
    "unsloth-4bit": "unsloth, 4-bit weights",
    "reference": "this trainer on the reference",
    "fast": "this trainer",
    "fast-4bit": "this trainer, 4-bit weights",
}
WARMUP = 4  # steps that compile, allocate and choose kernels


def prepare(folder: Path) -> None:
    """Write the model and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **special, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(folder)


def documents(steps: int) -> Any:
    """Enough documents for the steps: a Dataset of token ids, each of another length."""
    import numpy
    from datasets import Dataset

    draw = numpy.random.default_rng(0)
    lengths = numpy.clip(draw.lognormal(5.6, 0.9, size=steps * ROWS * LENGTH // 250).astype(int), 8, LENGTH)
    # A skewed choice of tokens, so that there is something to learn.
    tokens = (4 + draw.geometric(1e-3, lengths.sum()) % (SHAPE["vocab_size"] - 4)).tolist()
    starts = [0, *lengths.cumsum().tolist()]
    return Dataset.from_dict({"input_ids": [tokens[a:b] for a, b in pairwise(starts)]})


def options(folder: str, steps: int) -> dict[str, Any]:
    """What every trainer is told."""
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": ROWS, "packing": True,
        "max_length": LENGTH, "learning_rate": 2e-4, "lr_scheduler_type": "constant", "bf16": True,
        "optim": "adamw_torch_fused", "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0, "seed": 0,
    }  # fmt: skip


def varlen_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **keywords: Any
) -> tuple[Any, None]:
    """PyTorch's own attention over the documents of a row, as transformers calls attention."""
    from torch.nn.attention.varlen import varlen_attn

    def flat(heads: Any) -> Any:
        return heads.transpose(1, 2).flatten(0, 1)

    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bounds, longest = keywords["cu_seq_lens_q"], keywords["max_length_q"]
    attended = varlen_attn(flat(query), flat(key), flat(value), bounds, bounds, longest, longest, window_size=(-1, 0))
    return attended.unflatten(0, (query.shape[0], -1)), None


def trl_trainer(who: str, model_path: str, folder: str, steps: int) -> Any:
    """TRL's own trainer, with liger or not."""
    import torch
    from peft import LoraConfig
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    if "varlen" in who:
        AttentionInterface.register("varlen", varlen_attention)
        AttentionMaskInterface.register("varlen", lambda *_, **__: None)
    attention = "varlen" if "varlen" in who else "sdpa"
    load = AutoModelForCausalLM.from_pretrained
    model = load(model_path, dtype=torch.bfloat16, attn_implementation=attention, device_map={"": 0})
    args = SFTConfig(**options(folder, steps), use_liger_kernel="liger" in who)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR)
    return SFTTrainer(
        model, args, train_dataset=documents(steps), processing_class=tokenizer(model_path), peft_config=lora
    )


def tokenizer(model_path: str) -> Any:
    """Of the model's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


def unsloth_trainer(who: str, model_path: str, folder: str, steps: int) -> Any:
    """Unsloth's patched trainer, as its users build it."""
    from unsloth import FastLanguageModel  # isort: skip  # patches what is imported after it
    from trl import SFTConfig, SFTTrainer

    four = who.endswith("4bit")
    model, words = FastLanguageModel.from_pretrained(model_path, max_seq_length=LENGTH, load_in_4bit=four)
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, target_modules=LINEAR, use_gradient_checkpointing=False
    )
    args = SFTConfig(**options(folder, steps))
    return SFTTrainer(model, args, train_dataset=documents(steps), processing_class=words)


def our_trainer(who: str, model_path: str, folder: str, steps: int) -> Any:
    """This project's trainer."""
    from unsloth_fast import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

    backend, _, four = who.partition("-")
    model, words = FastLanguageModel.from_pretrained(
        model_path, max_seq_length=LENGTH, load_in_4bit=bool(four), backend=backend
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, target_modules=LINEAR, use_gradient_checkpointing=False
    )
    args = UnslothTrainingArguments(**options(folder, steps), backend=backend)
    return UnslothTrainer(model, args, train_dataset=documents(steps), processing_class=words)


def run_one(who: str, model_path: str, steps: int, profile: bool) -> dict[str, Any]:
    """Train, and measure each step."""
    build = {"unsloth": unsloth_trainer, "fast": our_trainer, "reference": our_trainer}.get(
        who.split("-")[0], trl_trainer
    )
    with tempfile.TemporaryDirectory() as folder:
        if build is unsloth_trainer:  # before anything else is imported
            trainer = build(who, model_path, folder, steps)
        import torch
        from transformers import TrainerCallback

        if build is not unsloth_trainer:
            trainer = build(who, model_path, folder, steps)
        marks: list[float] = []
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if profile else None

        class Clock(TrainerCallback):
            """The time at the end of each step, with everything done that it began."""

            def on_step_end(self, *_: Any, **__: Any) -> None:
                torch.cuda.synchronize()
                marks.append(time.perf_counter())
                if len(marks) == WARMUP:
                    torch.cuda.reset_peak_memory_stats()
                if profiler and len(marks) == steps - 3:
                    profiler.start()

        trainer.add_callback(Clock())
        trainer.train()
        if profiler:
            profiler.stop()
    # With the profiler on, a step takes longer.
    seconds = [after - before for before, after in pairwise(marks)][WARMUP - 1 : steps - 4]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "who": who,
        "tokens_per_second": ROWS * LENGTH / statistics.median(seconds),
        "step_ms": statistics.median(seconds) * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": [log["loss"] for log in logs],
        "kernels": by_kernel(profiler, 3) if profiler else None,
    }


def by_kernel(profiler: Any, steps: int) -> dict[str, float]:
    """Milliseconds of a step that each kernel has the GPU, the longest first."""
    times: Counter[str] = Counter()
    for event in profiler.events():
        if "cuda" in str(event.device_type).lower():
            times[event.name[:70]] += event.device_time / 1e3 / steps
    return dict(times.most_common(40)) | {"all": sum(times.values())}


def main() -> int:
    """Each contender in its own process, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--who", nargs="+", choices=WHO, default=list(WHO), help="default: all")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, at least 10 (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the numbers (default: out)")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # a folder: this is the process of one contender
    parser.add_argument("--profile", action="store_true", help="show where the GPU's time goes, by kernel")
    chosen = parser.parse_args()
    if chosen.steps < 10:
        parser.error(f"argument --steps: {chosen.steps} is not at least 10")
    if chosen.model:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        result = run_one(chosen.who[0], chosen.model, chosen.steps, chosen.profile)
        (chosen.out / f"packed_lora_{chosen.who[0]}.json").write_text(json.dumps(result, indent=1))
        return 0
    import torch

    if not torch.cuda.is_available():
        parser.error("got no CUDA device; this measures speed, for which it takes one")
    chosen.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {ROWS} rows of {LENGTH} tokens a step")
    print(f"{'':<14}{'tokens/s':>10}{'ms':>8}{'GiB':>7}  loss: first, last")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        return max(show(who, folder, chosen) for who in chosen.who)


def show(who: str, model_path: str, chosen: argparse.Namespace) -> int:
    """One line of the table; 1 if the contender failed."""
    command = [sys.executable, __file__, "--model", model_path, "--who", who, "--steps", str(chosen.steps)]
    command += ["--out", str(chosen.out)] + ["--profile"] * chosen.profile
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        (chosen.out / f"packed_lora_{who}.txt").write_text(done.stdout + done.stderr)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{who:<14}failed: {last[:150]}", flush=True)
        return 1
    result = json.loads((chosen.out / f"packed_lora_{who}.json").read_text())
    losses = result["losses"]
    figures = f"{result['tokens_per_second']:>10,.0f}{result['step_ms']:>8.0f}{result['peak_gib']:>7.1f}"
    print(f"{who:<14}{figures}  {losses[0]:.4f} {losses[-1]:.4f}  {WHO[who]}", flush=True)
    for name, milliseconds in list((result["kernels"] or {}).items()):
        print(f"    {milliseconds:8.2f} ms  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

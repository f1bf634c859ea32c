"""The data, the model and the training of one run of `first_run.py`. Each run is one call of `train` in a process."""

import ast
import itertools
import json
import logging
import random
import resource
import statistics
import sysconfig
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import unsloth_fast  # before peft: it filters a warning that bitsandbytes logs on every import

# The interpreter takes 2 to 4 ms per Triton program, and rope and cross entropy run one program per token: about 100
# tokens per step.
SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "truth_dtype": "float64",
    "model": {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "batch": 2,
    "max_length": 64,
    "learning_rate": 1e-2,
    "embedding_learning_rate": 5e-3,
}
LARGE = {
    "device": "cuda",
    "dtype": "bfloat16",
    "truth_dtype": "float32",
    "model": {"vocab_size": 16384, "hidden_size": 1536, "num_hidden_layers": 14, "num_attention_heads": 12},
    "batch": 16,
    "max_length": 512,
    "learning_rate": 1e-3,
    "embedding_learning_rate": 5e-4,
}


def functions() -> list[tuple[str, str]]:
    """Every documented function of the standard library as (signature and docstring, body)."""
    found = []
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(path.relative_to(library).parts):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
                body = (node.body[0].end_lineno or node.lineno) - node.lineno + 1
                found.append(("\n".join(source[:body]), "\n" + "\n".join(source[body:])))
    return found


def prepare(folder: str, steps: int) -> dict[str, Any]:
    """Write tokenizer.json and data.json, the examples of one run; return the settings that fit the device."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    settings = LARGE if torch.cuda.is_available() else SMALL
    corpus = functions()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=settings["model"]["vocab_size"],
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((prompt + body for prompt, body in corpus), trainer)
    tokenizer.save(f"{folder}/tokenizer.json")

    limit = settings["max_length"]
    lengths = [len(encoding) for encoding in tokenizer.encode_batch([prompt + body for prompt, body in corpus])]
    # Similar lengths keep padding small, and every example is short enough to keep its <eos>.
    fitting = [pair for pair, length in zip(corpus, lengths, strict=True) if limit // 2 <= length < limit]
    random.Random(0).shuffle(fitting)
    examples = [{"prompt": prompt, "completion": body} for prompt, body in fitting[: steps * settings["batch"]]]
    Path(folder, "data.json").write_text(json.dumps(examples))
    name = torch.cuda.get_device_name() if settings["device"] == "cuda" else "CPU"
    return settings | {"steps": steps, "device_name": name}


def build_model(settings: dict[str, Any], seed: int, dtype: str) -> Any:
    """Build a Llama with random weights. They are rounded to the settings' dtype first, so all dtypes get the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = settings["model"]
    half, triple = shape["num_attention_heads"] // 2, 3 * shape["hidden_size"]
    config = LlamaConfig(**shape, num_key_value_heads=half, intermediate_size=triple)
    torch.manual_seed(seed)
    with torch.device(settings["device"]):
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, settings["dtype"])).to(getattr(torch, dtype))


def build_trainer(folder: str, settings: dict[str, Any], backend: str, seed: int, dtype: str) -> Any:
    """Build the trainer of one run."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, PrinterCallback

    args = unsloth_fast.UnslothTrainingArguments(
        output_dir=folder,
        backend=backend,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        max_length=settings["max_length"],
        learning_rate=settings["learning_rate"],
        embedding_learning_rate=settings["embedding_learning_rate"],
        weight_decay=0.01,
        warmup_steps=max(1, settings["steps"] // 10),
        lr_scheduler_type="cosine",
        bf16=dtype == "bfloat16",
        use_cpu=settings["device"] == "cpu",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token="<eos>", pad_token="<pad>")
    model = build_model(settings, seed, dtype)
    torch.manual_seed(seed)  # for the weights of LoRA
    trainer = unsloth_fast.UnslothTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(json.loads(Path(folder, "data.json").read_text())),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(folder: str, settings: dict[str, Any], backend: str, seed: int, dtype: str) -> dict[str, Any]:
    """Train once, and return the losses, the speed, the peak memory and the optimizer's groups."""
    import datasets
    import torch
    import transformers

    from conformance import interpreter

    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    times = []

    class Clock(transformers.TrainerCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())  # the loss has been read, so the device has finished the step

    trainer = build_trainer(folder, settings, backend, seed, dtype)
    trainer.add_callback(Clock())
    on_gpu = settings["device"] == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif backend != "reference":
        interpreter.patch_for_speed()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    counts = [entry["num_tokens"] for entry in logs]
    pairs = itertools.pairwise(zip(counts, times, strict=False))  # the end of the training is logged too
    # The median: steps that compile or load a kernel halve the mean of 30 (28 000 against 60 000 tokens/s on an H200).
    rate = statistics.median((count - count_before) / (at - before) for (count_before, before), (count, at) in pairs)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "losses": [entry["loss"] for entry in logs],
        "tokens_per_second": rate,
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else kibibytes / 2**10,
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "groups": [
            {"role": group["role"], "learning_rate": group["initial_lr"], "weight_decay": group["weight_decay"]}
            | {"parameters": sum(weight.numel() for weight in group["params"])}
            for group in trainer.optimizer.param_groups
        ],
    }

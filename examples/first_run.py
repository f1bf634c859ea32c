"""Fine-tune a small Llama on the reference and on the fast backend, and hold the two runs against each other.

    python examples/first_run.py [--steps N] [--out DIR] [--backends NAME ...]

Everything is made on the spot: a BPE tokenizer and a data set from the functions of Python's standard library (prompt:
signature and docstring, completion: body), and a Llama with random weights. LoRA trains its projections; its embeddings
and output head train in full at a learning rate of their own. Each backend starts from the same weights, sees the same
batches, and has a process of its own, so that its peak memory is its own. With a GPU the model is larger, in bfloat16.

How far apart may the losses be? Two right backends differ by rounding, and training carries the difference on. So the
reference also trains in a wider dtype, and the losses of that run are taken for the truth. The same pair of runs from
SEEDS different random weights shows how far rounding takes the reference off the truth. At every step a backend may be
off by MARGIN times the worst that any of these pairs has been off so far.
"""

import argparse
import ast
import itertools
import json
import logging
import os
import random
import resource
import statistics
import sysconfig
import tempfile
import textwrap
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SEEDS = 4
MARGIN = 4  # of independent normal errors of one size, one is over 4 times the largest of 4 others in 0.4 % of cases
LOSS_ULP = 2.0**-23  # relative; losses are float32 whatever the model is

# The interpreter takes 2 to 4 ms a Triton program, and rope and cross entropy are one a token: 100 tokens a step.
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
                rows = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
                seam = (node.body[0].end_lineno or node.lineno) - node.lineno + 1
                found.append(("\n".join(rows[:seam]), "\n" + "\n".join(rows[seam:])))
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
    # Of like length, so that little of a batch is padding, and short enough for the <eos> to come.
    fitting = [row for row, length in zip(corpus, lengths, strict=True) if limit // 2 <= length < limit]
    random.Random(0).shuffle(fitting)
    rows = [{"prompt": prompt, "completion": body} for prompt, body in fitting[: steps * settings["batch"]]]
    Path(folder, "data.json").write_text(json.dumps(rows))
    name = torch.cuda.get_device_name() if settings["device"] == "cuda" else "CPU"
    return settings | {"steps": steps, "device_name": name}


def build_model(settings: dict[str, Any], seed: int, dtype: str) -> Any:
    """A Llama with random weights, the same ones in every dtype: rounded to the settings' dtype first."""
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
    """The trainer of one run."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, PrinterCallback

    from unsloth_fast import UnslothTrainer, UnslothTrainingArguments

    args = UnslothTrainingArguments(
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
    trainer = UnslothTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(json.loads(Path(folder, "data.json").read_text())),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"]),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(folder: str, settings: dict[str, Any], backend: str, seed: int, dtype: str) -> dict[str, Any]:
    """Do one run and measure it."""
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
    pairs = itertools.pairwise(zip(counts, times, strict=False))  # training's end is logged, too
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


def in_child(function: Any, *calls: tuple[Any, ...]) -> list[Any]:
    """Make the calls, one after the other, in one fresh process, which imports under the environment as it is now."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return list(pool.map(function, *zip(*calls, strict=True)))


def off(losses: list[float], truth: list[float]) -> list[float]:
    """The distance of each step's loss from the truth."""
    return [abs(loss - true) for loss, true in zip(losses, truth, strict=True)]


def judge(runs: dict[str, Any], yardsticks: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """How far each run is off, how far it may be, and the steps where one is further off or not finite.

    The yardsticks are the reference's losses and the true ones, one pair a seed, the first for the seed of the runs.
    """
    truth = yardsticks[0][1]
    worst = itertools.accumulate(map(max, *(off(*pair) for pair in yardsticks)), max)
    allowed = [MARGIN * max(error, LOSS_ULP * true) for error, true in zip(worst, truth, strict=True)]
    distances = {name: off(run["losses"], truth) for name, run in runs.items()}
    steps = zip(allowed, *distances.values(), strict=True)
    failed = [step for step, (limit, *errors) in enumerate(steps, 1) if not all(error <= limit for error in errors)]
    return {"off": distances, "allowed": allowed, "failed_steps": failed}


def compare(folder: str, steps: int, backends: list[str]) -> dict[str, Any]:
    """Do all runs; return what they gave and what to think of it."""
    [settings] = in_child(prepare, (folder, steps))
    if settings["device"] == "cpu":
        os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # too small a model for two threads
        print("No GPU: the fast kernels run in Triton's interpreter, and speed and memory below mean nothing.")
    dtypes = settings["dtype"], settings["truth_dtype"]
    calls = [(folder, settings, "reference", seed, dtype) for seed in range(SEEDS) for dtype in dtypes]
    # A GPU is timed, and a run has it to itself; without one there is a core for each of two.
    with ThreadPoolExecutor(1 if settings["device"] == "cuda" else 2) as pool:
        one_each = {name: pool.submit(in_child, train, (folder, settings, name, 0, dtypes[0])) for name in backends}
        of_yardsticks = pool.submit(in_child, train, *calls)
    runs = {name: run.result()[0] for name, run in one_each.items()}
    losses = [run["losses"] for run in of_yardsticks.result()]
    yardsticks = list(zip(losses[::2], losses[1::2], strict=True))

    model, millions = settings["model"], next(iter(runs.values()))["parameters"] / 1e6
    title = f"Llama, {model['num_hidden_layers']} layers of {model['hidden_size']}, {millions:.1f} M parameters"
    report = {"title": f"{title}, {dtypes[0]}, {settings['device_name']}", "settings": settings, "runs": runs}
    return report | {"yardsticks": yardsticks, **judge(runs, yardsticks)}


def show(report: dict[str, Any]) -> None:
    """Print the losses, the optimizer's groups, speed and memory."""
    runs = report["runs"]
    widths = {name: max(11, len(name) + 2) for name in runs}
    print(f"{report['title']}\n\nstep" + "".join(f"{name:>{width}}" for name, width in widths.items()), end="")
    print("".join(f"{name + ' off':>{width + 4}}" for name, width in widths.items()) + "     allowed")
    for step, limit in enumerate(report["allowed"]):
        line = f"{step + 1:4}" + "".join(f"{runs[name]['losses'][step]:{width}.6f}" for name, width in widths.items())
        line += "".join(f"{report['off'][name][step]:{width + 4}.1e}" for name, width in widths.items())
        print(f"{line}{limit:12.1e}" + ("  <- too far" if step + 1 in report["failed_steps"] else ""))
    print(f"off: distance from the reference in {report['settings']['truth_dtype']}")
    print(f"allowed: {MARGIN} times the worst so far of the reference, from {SEEDS} random starts")
    first, *others = runs
    for name in others:
        gaps = off(runs[name]["losses"], runs[first]["losses"])
        print(f"largest difference between {first} and {name}: {max(gaps):.1e}, at step {gaps.index(max(gaps)) + 1}")

    print("\ngroup       parameters  learning rate  weight decay")
    for group in next(iter(runs.values()))["groups"]:
        print("{role:10}{parameters:12,}{learning_rate:15.1e}{weight_decay:14g}".format(**group))

    print("\nbackend          tokens/s   peak memory")
    for name, run in runs.items():
        print(f"{name:13}{run['tokens_per_second']:12,.0f}{run['peak_memory_mib']:10,.0f} MiB")


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the losses above and their distances from the truth, on a logarithmic scale, below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    allowed = report["allowed"]
    steps = range(1, len(allowed) + 1)
    ratios = {"height_ratios": (3, 2), "layout": "constrained"}
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(8, 6.5), **ratios)
    for place, (name, run) in enumerate(report["runs"].items()):
        # The first backend is wide and pale, so that the next one over it hides nothing.
        style = {"linewidth": 6, "markersize": 9, "alpha": 0.35} if place == 0 else {"linewidth": 1.5, "markersize": 4}
        upper.plot(steps, run["losses"], label=name, color=f"C{place}", **style)
        lower.plot(steps, report["off"][name], "o", color=f"C{place}", clip_on=False, **style)
    lower.plot(steps, allowed, "--", color="0.4", label="allowed")
    upper.set(ylabel="loss (nats per token)", title=report["title"])
    lower.set_yscale("symlog", linthresh=allowed[0] / MARGIN)  # linear below, so that a distance of 0 has a place
    lower.set(xlabel="step", ylabel=f"distance from {report['settings']['truth_dtype']}", ylim=(0, None))
    for axes in (upper, lower):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Run, show, write the plot and the numbers; 1 if a backend is off by more than rounding explains."""
    parser = argparse.ArgumentParser(description="Fine-tune a small Llama on each backend and compare the losses.")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps, at least 2 (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of plot and numbers (default: out)")
    parser.add_argument("--backends", nargs="+", default=["reference", "fast"], help="default: reference fast")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"argument --steps: {options.steps} is not at least 2")
    from unsloth_fast import backends

    for name in options.backends:
        try:
            backends.parse(name)
        except ValueError as error:
            parser.error(f"argument --backends: {error}")

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        # The caches go with the folder: the run leaves nothing behind but what it wrote to options.out.
        os.environ.update(HF_HOME=folder, TRITON_CACHE_DIR=folder, CUDA_CACHE_PATH=folder, MPLCONFIGDIR=folder)
        report = compare(folder, options.steps, options.backends)
        show(report)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "first_run.json").write_text(json.dumps(report, indent=1))
        plot(report, options.out / "first_run.png")
    print(f"\nwrote {options.out / 'first_run.png'} and {options.out / 'first_run.json'}")
    print("FAIL: off by more than rounding" if report["failed_steps"] else "ok: the same losses but for rounding")
    return 1 if report["failed_steps"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

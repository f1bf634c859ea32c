"""Time a packed training step of this trainer beside trl, liger and unsloth.

    python examples/step_benchmark.py [--shape NAME] [--rows N] [--length N] [--mode lora|embed|gc|full] [--gpus N]
                                      [--who NAME ...] [--steps N] [--json FILE] [--profile]

All contenders train the same model with random weights (without options, the shape of Llama 3.2 1B with LoRA of rank 16
on every linear layer and 8 rows of 2048 tokens per step) in bfloat16 with AdamW. The rows are packed from documents
with log-normal lengths, as text has them: most have a few hundred tokens, a few fill a row. Every contender runs in its
own process, loads the same files and sees the same documents. The table shows tokens per second (of the median step),
peak memory of one GPU, the model FLOP utilisation ("use"), the share of the step in which the GPU waits ("idle"; see
step_work.py), and the loss of the first and of the last five steps, from which you see whether all train the same
thing. --json writes the same as steps.schema.json describes, again after every contender. --profile also shows where
the GPU's time goes, by kernel.
"""

import argparse
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import random_model
import step_work
from step_contenders import CONTENDERS, MODES, Job, build, lengths
from step_shapes import SHAPES

WARMUP = 4  # steps that compile, allocate and choose kernels
PROFILED = 3  # steps
PACKAGES = ("transformers", "trl", "peft", "liger-kernel", "unsloth")


def run_one(contender: str, job: Job, profile: bool) -> dict[str, Any]:
    """Train with one contender, and measure each step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(contender, job, folder)  # before anything else is imported
        import torch
        from transformers import TrainerCallback

        ends: list[Any] = []  # when the GPU has finished each step
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

        class Clock(TrainerCallback):
            """Lets the GPU note the time at the end of each step; the host need not wait for it."""

            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
                if len(ends) == WARMUP:
                    torch.cuda.reset_peak_memory_stats()
                if len(ends) == job.steps - PROFILED:
                    torch.cuda.synchronize()
                    profiler.start()

        trainer.add_callback(Clock())
        trainer.train()
        torch.cuda.synchronize()
        profiler.stop()
    # The last steps are left out: under the profiler a step takes longer.
    seconds = [before.elapsed_time(after) / 1e3 for before, after in pairwise(ends)]
    seconds = seconds[WARMUP - 1 : job.steps - PROFILED - 1]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    step = statistics.median(seconds)
    work = step_work.operations(trainer.model, lengths(job), job.tokens)
    return {
        "who": contender,
        "what": CONTENDERS[contender],
        "tokens_per_second": job.tokens / step,
        "step_ms": step * 1e3,
        "peak_gib": (torch.cuda.max_memory_allocated() + kept_by_graphs()) / 2**30,
        "teraflops": work / step / job.gpus / 1e12,
        "idle_share": step_work.idle_share(intervals(profiler), PROFILED * step),
        "losses": [log["loss"] for log in logs],
        "kernels": by_kernel(profiler) if profile else None,
    }


def kept_by_graphs() -> int:
    """The bytes that CUDA graphs keep for their replays, and that no tensor holds."""
    import torch

    segments = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


def on_gpu(profiler: Any) -> list[Any]:
    """The events of kernels and copies."""
    return [event for event in profiler.events() if "cuda" in str(event.device_type).lower()]


def intervals(profiler: Any) -> list[tuple[float, float]]:
    """When the GPU's kernels and copies ran, in seconds."""
    return [(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in on_gpu(profiler)]


def by_kernel(profiler: Any) -> dict[str, float]:
    """Milliseconds of GPU time per step of each kernel, the longest first, and of all kernels together."""
    times: Counter[str] = Counter()
    for event in on_gpu(profiler):
        times[event.name[:70]] += event.device_time / 1e3 / PROFILED
    return dict(times.most_common(40)) | {"all": sum(times.values())}


def main() -> int:
    """Run each contender in its own process and print the table; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b", help="the model (default: llama-3.2-1b)")
    parser.add_argument("--rows", type=int, default=8, help="rows per step (default: 8)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row (default: 2048)")
    modes = "; ".join(f"{name}: {what}" for name, what in MODES.items())
    parser.add_argument("--mode", choices=MODES, default="lora", help=f"what is trained ({modes}; default: lora)")
    parser.add_argument("--gpus", type=int, default=1, help="each with these rows, by torchrun (default: 1)")
    parser.add_argument("--who", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, at least 10 (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # a folder: this is the process of one contender
    parser.add_argument("--profile", action="store_true", help="show where the GPU's time goes, by kernel")
    chosen = parser.parse_args()
    for name, least in (("steps", 10), ("rows", 1), ("length", 8), ("gpus", 1)):
        if getattr(chosen, name) < least:
            parser.error(f"argument --{name}: got {getattr(chosen, name)}; allowed: an integer from {least}")
    if chosen.model:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        job = Job(chosen.shape, chosen.model, chosen.rows, chosen.length, chosen.mode, chosen.steps, chosen.gpus)
        result = run_one(chosen.who[0], job, chosen.profile)
        if os.environ.get("RANK", "0") == "0":
            chosen.json.write_text(json.dumps(result))
        return 0
    import torch

    from conformance.bench.card import Card

    if not torch.cuda.is_available():
        parser.error("got no CUDA device; this benchmark measures speed, and needs one")
    if chosen.gpus > torch.cuda.device_count():
        parser.error(f"argument --gpus: got {chosen.gpus}; allowed: up to {torch.cuda.device_count()}")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    what = f"{chosen.shape}, {MODES[chosen.mode]}, {chosen.rows} rows of {chosen.length} tokens per step and GPU"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {what}")
    rate = Card().rates().matmul / 1e12
    print(f"{'':<14}{'tokens/s':>10}{'ms':>8}{'GiB':>7}{'use':>7}{'idle':>7}  loss: first, last")
    results: list[dict[str, Any] | None] = []
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[chosen.shape]
        random_model.save(folder, "cuda", "bfloat16", shape.model_type, **shape.fields)
        for contender in chosen.who:
            results.append(show(contender, folder, chosen, rate))
            if chosen.json:  # after every contender, so that a stopped run leaves what it found
                write(chosen, torch.cuda.get_device_name(), rate, results)
    return int(None in results)


def write(chosen: argparse.Namespace, gpu: str, rate: float, results: Sequence[dict[str, Any] | None]) -> None:
    """Write the file of results.

    Args:
        chosen: what the command line says.
        gpu: its name.
        rate: of a large matrix product, in TFLOP/s.
        results: of the contenders; None for one that failed.
    """
    from conformance.reporting import results_file

    meta = {name: getattr(chosen, name) for name in ("shape", "rows", "length", "mode", "gpus")}
    meta |= {"gpu": gpu, "matmul_teraflops": rate, "commit": results_file.commit()}
    meta["versions"] = results_file.versions() | {package: version_of(package) for package in PACKAGES}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    results_file.write(chosen.json, meta, [result for result in results if result])


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show(contender: str, model_path: str, chosen: argparse.Namespace, rate: float) -> dict[str, Any] | None:
    """Run one contender, print its line of the table and return its result; None if it failed.

    Args:
        contender: its name.
        model_path: the folder of the model.
        chosen: what the command line says.
        rate: of a large matrix product, in TFLOP/s.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={chosen.gpus}"]
    command = [sys.executable, *(launcher if chosen.gpus > 1 else ()), __file__]
    path = Path(model_path) / "result.json"
    command += ["--model", model_path, "--who", contender, "--json", str(path)]
    for name in ("shape", "rows", "length", "mode", "steps", "gpus"):
        command += [f"--{name}", str(getattr(chosen, name))]
    command += ["--profile"] * chosen.profile
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{contender:<14}failed: {reason(done)}", flush=True)
        print(done.stderr, file=sys.stderr)
        return None
    result = json.loads(path.read_text())
    losses = result["losses"]
    figures = f"{result['tokens_per_second']:>10,.0f}{result['step_ms']:>8.0f}{result['peak_gib']:>7.1f}"
    figures += f"{result['teraflops'] / rate:>7.1%}{result['idle_share']:>7.1%}"
    print(f"{contender:<14}{figures}  {losses[0]:.4f} {losses[-1]:.4f}  {CONTENDERS[contender]}", flush=True)
    for name, milliseconds in (result["kernels"] or {}).items():
        print(f"    {milliseconds:8.2f} ms  {name}")
    return result


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed: its last error, or, if a signal ended it, how it ended."""
    errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return errors[-1][:150] if errors else f"exit status {done.returncode}, without a message"


if __name__ == "__main__":
    raise SystemExit(main())

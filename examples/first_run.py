"""Fine-tune a small Llama on the reference and on the fast backend, and compare the losses of the two runs.

    python examples/first_run.py [--steps N] [--out DIR] [--backends NAME ...]

The script needs no download. It trains a BPE tokenizer on the functions of Python's standard library, uses them as the
data set (prompt: signature and docstring, completion: body), and starts from a Llama with random weights. LoRA trains
the projections; the embeddings and the output head are trained in full, at their own learning rate. Every backend
starts from the same weights, sees the same batches, and runs in its own process, so that its peak memory is its own.
With a GPU the model is larger and in bfloat16.

How far apart may the losses be? Two correct backends differ by rounding, and training amplifies the difference.
Therefore the reference is also trained in a wider dtype, and the losses of that run count as the truth. The same pair
of runs is made from SEEDS different random weights: it shows how far rounding moves the reference away from the truth.
At every step a backend may be off by MARGIN times the largest distance of any of these pairs so far.
"""

import argparse
import itertools
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from first_run_report import plot, show
from first_run_training import prepare, train

SEEDS = 4
MARGIN = 4  # of independent normal errors of one size, one is over 4 times the largest of 4 others in 0.4 % of cases
LOSS_ULP = 2.0**-23  # relative; losses are float32 in every run


def in_child(function: Any, *calls: tuple[Any, ...]) -> list[Any]:
    """Make the calls, one after the other, in one new process, which imports under the current environment."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return list(pool.map(function, *zip(*calls, strict=True)))


def distances(losses: list[float], truth: list[float]) -> list[float]:
    """The distance of each step's loss from the truth."""
    return [abs(loss - true) for loss, true in zip(losses, truth, strict=True)]


def judge(runs: dict[str, Any], baselines: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Compare each run with the truth.

    Args:
        runs: of each backend what `train` returned.
        baselines: per seed, the losses of the reference and the true ones; the runs use the first seed.

    Returns:
        How far each run is off, how far it may be, and the steps at which one is further off or not finite.
    """
    truth = baselines[0][1]
    worst = itertools.accumulate(map(max, *(distances(*pair) for pair in baselines)), max)
    allowed = [MARGIN * max(error, LOSS_ULP * true) for error, true in zip(worst, truth, strict=True)]
    off = {name: distances(run["losses"], truth) for name, run in runs.items()}
    steps = zip(allowed, *off.values(), strict=True)
    failed = [step for step, (limit, *errors) in enumerate(steps, 1) if not all(error <= limit for error in errors)]
    return {"off": off, "allowed": allowed, "margin": MARGIN, "failed_steps": failed}


def compare(folder: str, steps: int, backends: list[str]) -> dict[str, Any]:
    """Make all runs; return their results and the judgement."""
    [settings] = in_child(prepare, (folder, steps))
    if settings["device"] == "cpu":
        os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # too small a model for two threads
        print("No GPU: the fast kernels run in Triton's interpreter, and speed and memory below mean nothing.")
    dtypes = settings["dtype"], settings["truth_dtype"]
    calls = [(folder, settings, "reference", seed, dtype) for seed in range(SEEDS) for dtype in dtypes]
    # On a GPU the runs are timed, so they run one at a time; on a CPU two run at once, one per core.
    with ThreadPoolExecutor(1 if settings["device"] == "cuda" else 2) as pool:
        of_backends = {name: pool.submit(in_child, train, (folder, settings, name, 0, dtypes[0])) for name in backends}
        of_baselines = pool.submit(in_child, train, *calls)
    runs = {name: run.result()[0] for name, run in of_backends.items()}
    losses = [run["losses"] for run in of_baselines.result()]
    baselines = list(zip(losses[::2], losses[1::2], strict=True))

    model, millions = settings["model"], next(iter(runs.values()))["parameters"] / 1e6
    title = f"Llama, {model['num_hidden_layers']} layers of {model['hidden_size']}, {millions:.1f} M parameters"
    report = {"title": f"{title}, {dtypes[0]}, {settings['device_name']}", "settings": settings, "runs": runs}
    return report | {"baselines": baselines, **judge(runs, baselines)}


def main() -> int:
    """Train, show, write the plot and the numbers; 1 if a backend is off by more than rounding explains."""
    parser = argparse.ArgumentParser(description="Fine-tune a small Llama on each backend and compare the losses.")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps, at least 2 (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of plot and numbers (default: out)")
    parser.add_argument("--backends", nargs="+", default=["reference", "fast"], help="default: reference fast")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"argument --steps: got {options.steps}; allowed: an integer from 2")
    from unsloth_fast import backends

    for name in options.backends:
        try:
            backends.parse(name)
        except ValueError as error:
            parser.error(f"argument --backends: {error}")

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        # The caches are deleted with the folder: only what is written to options.out remains.
        os.environ.update(HF_HOME=folder, TRITON_CACHE_DIR=folder, CUDA_CACHE_PATH=folder, MPLCONFIGDIR=folder)
        report = compare(folder, options.steps, options.backends)
        show(report)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "first_run.json").write_text(json.dumps(report, indent=1))
        plot(report, options.out / "first_run.png")
    print(f"\nwrote {options.out / 'first_run.png'} and {options.out / 'first_run.json'}")
    print("FAIL: off by more than rounding" if report["failed_steps"] else "ok: the same losses up to rounding")
    return 1 if report["failed_steps"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

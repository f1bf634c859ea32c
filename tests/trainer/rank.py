"""Training runs of one process or of one of several, or evaluations.

`python -m tests.trainer.rank FOLDER RUNS` with the runs as JSON, `null` among them for evaluations without a training.
Each process saves its results to FOLDER.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from torch import nn

from conformance.interpreter import patch_for_speed
from tests import tiny
from tests.trainer import test_evaluation
from tests.trainer.runs import BATCHINGS, TRAINED, arguments, build
from unsloth_fast import UnslothTrainer


@dataclass(frozen=True)
class Run:
    """A training run of 20 steps, unless `options`, which are arguments of the trainer, name another number.

    `sharded` shards the parameters over the processes (FSDP2). `resumed` trains a second time from the checkpoint of
    the tenth step.
    """

    batching: str
    trained: str
    accumulation: int
    options: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    resumed: bool = False
    dtype: str = "float64"

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that plain TRL has, too."""
        return {"gradient_accumulation_steps": self.accumulation, "max_length": 24, "max_steps": 20} | self.options


def train(folder: Path, run: Run, rows: int) -> dict[str, Any]:
    """Train with this many texts or packed rows per microbatch, evaluate five texts, and return what was observed."""
    options = BATCHINGS[run.batching] | TRAINED[run.trained] | run.given
    options |= {"per_device_train_batch_size": rows, "per_device_eval_batch_size": 1, "eval_packing": False}
    if run.sharded:
        options |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    if run.resumed:
        options |= {"save_strategy": "steps", "save_steps": 10}
    items: list[int] = []
    seen: list[int] = []
    logits: list[bool] = []

    class Counting(UnslothTrainer):
        def _get_num_items_in_batch(self, *positional: Any) -> Any:
            items.append(int(count := super()._get_num_items_in_batch(*positional)))
            return count

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(len(prediction.predictions))
        return {}

    def make() -> Any:
        args = arguments(folder, **options)
        if run.sharded:
            # accelerate shards on several GPUs only; on several CPUs it silently uses data parallelism.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        texts = Dataset.from_dict({"text": tiny.texts(5, seed=1)})
        more = {"eval_dataset": texts, "compute_metrics": metrics}
        return build(Counting, args, getattr(torch, run.dtype), lora=run.trained == "lora", **more)

    linear = nn.Linear.forward

    def watched(self: nn.Linear, *inputs: torch.Tensor) -> torch.Tensor:
        in_a_step = self.training and torch.is_grad_enabled()  # the check of the head has a few, without gradients
        logits.append(self.out_features == len(tiny.WORDS) and in_a_step)
        return linear(self, *inputs)

    nn.Linear.forward = watched
    with tiny.KeepFloat64() if run.dtype == "float64" else nullcontext():
        trainer = make()
        trainer.train()
        trace = {"losses": trainer.losses[:], "items": items[:], "log": trainer.state.log_history}
        if run.resumed:
            again = make()
            again.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
            trace["again"] = again.losses
        trace |= {"eval_loss": trainer.evaluate()["eval_loss"], "eval_rows": seen, "logits": any(logits)}
    nn.Linear.forward = linear
    groups = [
        (group.get("role"), sum(map(torch.numel, group["params"])), group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
    ]
    shards = sum(type(entry).__name__ == "DTensor" for entry in trainer.model.parameters())
    return trace | {"groups": groups, "shards": shards}


def evaluations(folder: Path) -> dict[tuple[str, int, bool], tuple[dict[str, Any], dict[str, Any]]]:
    """The results and the log of evaluations by batching, rows per microbatch, and whether without metrics."""
    found = {}
    with tiny.KeepFloat64():
        for batching, options in test_evaluation.BATCHINGS.items():
            for size in (1, 2, 3):
                for metrics in (None, lambda prediction: {"rows": len(prediction.label_ids)}):
                    args = arguments(folder, per_device_eval_batch_size=size, **options)
                    data = {"eval_dataset": test_evaluation.texts(), "compute_metrics": metrics}
                    trainer: Any = build(UnslothTrainer, args, **data)
                    found[batching, size, metrics is None] = trainer.evaluate(), trainer.state.log_history[-1]
    return found


def main(folder: str, runs: str) -> None:
    """Run each training in turn and save the results of this process."""
    folders = ((Path(folder) / str(index), run) for index, run in enumerate(json.loads(runs)))
    found = [train(own, Run(**run), rows=1) if run else evaluations(own) for own, run in folders]
    torch.save(found, Path(folder) / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


def as_json(runs: Sequence[Run | None]) -> str:
    """The runs as an argument of the command line."""
    return json.dumps([run and asdict(run) for run in runs])


if __name__ == "__main__":
    if not torch.cuda.is_available():
        patch_for_speed()
    main(*sys.argv[1:])

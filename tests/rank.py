"""A training run for one process or one of several: `python -m tests.rank FOLDER KIND ROWS`; the trace goes to FOLDER.

KIND is "ddp" for data parallelism, or "fsdp2" for parameters that are sharded, too; with one process it is neither.
"fsdp2-bf16" computes in bfloat16, all others in float64.
ROWS is the number of packed rows in a microbatch of this process.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from torch import nn

from tests import tiny
from tests.runs import arguments, build
from unsloth_fast import UnslothTrainer


def run(folder: str, kind: str, rows: int) -> None:
    """Four steps of two microbatches each, packed, and an evaluation of five documents."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "packing": True,
        "eval_packing": False,
        "max_length": 24,
        "embedding_learning_rate": 1e-4,
    }
    sharded = kind.startswith("fsdp2")
    if sharded:
        options |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    args = arguments(Path(folder), bf16=kind == "fsdp2-bf16", **options)
    if sharded:
        # accelerate shards on several GPUs only, and takes several CPUs for data parallelism without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    items: list[int] = []
    seen: list[int] = []

    class Counting(UnslothTrainer):
        def _get_num_items_in_batch(self, *positional: Any) -> Any:
            items.append(int(count := super()._get_num_items_in_batch(*positional)))
            return count

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(len(prediction.predictions))
        return {}

    logits: list[bool] = []
    linear = nn.Linear.forward

    def watched(self: nn.Linear, *inputs: torch.Tensor) -> torch.Tensor:
        logits.append(self.out_features == len(tiny.WORDS) and self.training)
        return linear(self, *inputs)

    nn.Linear.forward = watched
    with nullcontext() if args.bf16 else tiny.KeepFloat64():
        texts = Dataset.from_dict({"text": tiny.texts(5, seed=1)})
        dtype = torch.float32 if args.bf16 else torch.float64
        trainer = build(Counting, args, dtype, texts=40, eval_dataset=texts, compute_metrics=metrics)
        trainer.train()
        losses = trainer.losses[:]
        evaluated = trainer.evaluate()["eval_loss"]
    nn.Linear.forward = linear
    groups = [
        (group["role"], sum(map(torch.numel, group["params"])), group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
    ]
    shards = sum(type(entry).__name__ == "DTensor" for entry in trainer.model.parameters())
    trace = {"losses": losses, "items": items, "groups": groups, "shards": shards, "log": trainer.state.log_history}
    trace |= {"eval_loss": evaluated, "eval_rows": seen, "logits": any(logits)}
    torch.save(trace, Path(folder) / f"{args.process_index}-of-{args.world_size}.pt")


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    torch.distributed.destroy_process_group()

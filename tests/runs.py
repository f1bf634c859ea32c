"""Short training runs of tiny models, for the tests of the trainer."""

from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests import tiny
from unsloth_fast import UnslothTrainingArguments

datasets.disable_progress_bars()

# One step that takes off the gradient itself.
SGD = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0}

LORA = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["embed_tokens", "norm"]}


def arguments(folder: Path, kind: type = UnslothTrainingArguments, **options: Any) -> Any:
    """Arguments for six steps of two texts each on the CPU, every step logged."""
    if kind is UnslothTrainingArguments:
        options = {"backend": "reference"} | options
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    return kind(**defaults | options)


def build(kind: type, args: Any, dtype: torch.dtype = torch.float64, lora: bool = False, **options: Any) -> Any:
    """A trainer that keeps the loss of every microbatch in `losses`."""

    class Recording(kind):
        losses: list[float] = []  # noqa: RUF012  # one list a trainer, as the class is its own

        def compute_loss(self, *positional: Any, **keywords: Any) -> Any:
            result = super().compute_loss(*positional, **keywords)
            self.losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    return Recording(
        model=options.pop("model", None) or tiny.model(dtype=dtype),
        args=args,
        train_dataset=Dataset.from_dict({"text": tiny.texts(options.pop("texts", 18))}),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, **LORA) if lora else None,
        **options,
    )


def textbook(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Cross entropy of the next token, by torch."""
    logits = outputs.logits[:, :-1].reshape(-1, len(tiny.WORDS))
    return cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch

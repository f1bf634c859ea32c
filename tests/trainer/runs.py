"""Short training runs of tiny models, for the tests of the trainer."""

from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from tests import tiny
from unsloth_fast import UnslothTrainingArguments

datasets.disable_progress_bars()

TRL_DROPS_LABELS = Version(trl.__version__) < Version("1.7")  # of a stream that it packs

# One step that subtracts the gradient itself.
SGD = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0}

BATCHINGS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True},
}

# "lora" is an argument of `build`.
TRAINED: dict[str, dict[str, Any]] = {"full": {}, "embedding rate": {"embedding_learning_rate": 1e-4}, "lora": {}}

LORA = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["embed_tokens", "norm"]}


def arguments(folder: Path, kind: type = UnslothTrainingArguments, **options: Any) -> Any:
    """Arguments for six steps of two texts each on the CPU, with every step logged."""
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
        losses: list[float] = []  # noqa: RUF012  # one list per trainer: each has its own class

        def compute_loss(self, *positional: Any, **keywords: Any) -> Any:
            result = super().compute_loss(*positional, **keywords)
            self.losses.append((result[0] if isinstance(result, tuple) else result).item())
            return result

    return Recording(
        model=options.pop("model", None) or tiny.model(dtype=dtype),
        args=args,
        train_dataset=Dataset.from_dict({"text": tiny.texts(options.pop("texts", 18))}),
        processing_class=tiny.tokenizer(),
        **{"peft_config": LoraConfig(r=4, **LORA) if lora else None} | options,
    )


def textbook(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Cross entropy of the next token, by torch."""
    logits = outputs.logits[:, :-1].reshape(-1, len(tiny.WORDS))
    return cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch


def plain_trl(folder: Path, batching: str, trained: str, texts: int = 18, **options: Any) -> Any:
    """TRL's trainer on Hugging Face's own model in float64, after training.

    Its batches are padded, or packed by TRL; its loss is torch's cross entropy of the logits; its optimizer is grouped
    by name.
    """
    with tiny.KeepFloat64():
        model, more = tiny.model(dtype=torch.float64), {}
        if trained == "embedding rate":
            more["optimizers"] = (grouped_by_name(model), None)
        args = arguments(folder, SFTConfig, packing=batching == "packed", **options)
        theirs = build(
            SFTTrainer, args, model=model, lora=trained == "lora", texts=texts, compute_loss_func=textbook, **more
        )
        theirs.train()
    assert not hasattr(theirs, "backend")
    return theirs


def grouped_by_name(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with the arguments' rate and weight decay, a tenth of the rate for embeddings and no decay for norms."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        rate = 1e-4 if "embed_tokens" in name or "lm_head" in name else 1e-3
        groups.setdefault((rate, 0.0 if "norm" in name else 0.1), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    )

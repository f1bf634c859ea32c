"""Small data sets, and a trainer on one of them, for the tests of the data pieces."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from tests import tiny
from tests.trainer.runs import arguments
from unsloth_fast import UnslothTrainer

SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def tokens(*lengths: int, **columns: Any) -> Dataset:
    """Documents of these lengths, in which every token but the first is a target."""
    rows = [list(range(3, 3 + length)) for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows} | columns)


def labelled(*rows: list[int], **columns: Any) -> Dataset:
    """Documents with these labels."""
    return Dataset.from_dict({"input_ids": [[3] * len(row) for row in rows], "labels": list(rows)} | columns)


def ids(*rows: list[int], **columns: Any) -> Dataset:
    """Documents of these tokens, without labels."""
    return Dataset.from_dict({"input_ids": list(rows)} | columns)


def text(*rows: Any) -> Dataset:
    """A column "text" with these values."""
    return Dataset.from_dict({"text": list(rows)})


def stream(data: Dataset) -> IterableDataset:
    """The same rows as a stream, which can only be read from its start."""
    return IterableDataset.from_generator(lambda: iter(data.to_list()))


def first_alone(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A user's data collator: a batch of the first example alone."""
    row = torch.tensor([examples[0]["input_ids"]])
    return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def bloom() -> PreTrainedModel:
    """A model whose forward takes no position_ids."""
    return BloomForCausalLM(BloomConfig(vocab_size=len(tiny.WORDS), hidden_size=16, n_layer=1, n_head=2))


def trainer_on(folder: Path, data: Any, trainer_class: type = UnslothTrainer, **options: Any) -> Any:
    """A trainer on this data set; options that are not arguments of the trainer are fields of its configuration."""
    names = ("model", "eval_dataset", "data_collator", "peft_config", "compute_metrics", "formatting_func")
    given = {"model": tiny.model()} | {name: options.pop(name) for name in names if name in options}
    args = arguments(folder, **options)
    return trainer_class(args=args, train_dataset=data, processing_class=tiny.tokenizer(), **given)

"""Runs scripts written for Unsloth, and plain TRL on the same texts, for the tests that compare the two."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import unsloth_fast.chat_templates
from tests import tiny
from tests.chat_tokenizers import byte_level, finished
from tests.trainer.runs import arguments

SIZES = {"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS = {"max_steps": 4, "learning_rate": 1e-2, "weight_decay": 0.0, "lr_scheduler_type": "constant"}


def save_model(path: Path, model_class: Any = None, **config: Any) -> str:
    """Save a small model, and a tokenizer that adds no begin token by itself; return the folder."""
    made = finished(byte_level().backend_tokenizer)
    made.backend_tokenizer.post_processor = None
    made.save_pretrained(path)
    config = SIZES | {"vocab_size": len(made)} | config
    if model_class is None:
        model: Any = tiny.model(**config)
    else:
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**config))
    model.save_pretrained(path)
    return str(path)


def run(code: str, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
    """Run a script that imports `unsloth`, which is this package on the reference backend; return its variables."""
    monkeypatch.setenv("UNSLOTH_BACKEND", "reference")
    monkeypatch.setitem(sys.modules, "unsloth", unsloth_fast)
    monkeypatch.setitem(sys.modules, "unsloth.chat_templates", unsloth_fast.chat_templates)
    exec(compile(code, "<script>", "exec"), names)
    return names


def by_hand(tokenizer: Any, texts: list[str], trained: str = "(.*)") -> Dataset:
    """The tokens of the texts, and labels for the characters that the expression's first group finds."""
    rows = []
    for text in texts:
        spans = [match.span(1) for match in re.finditer(trained, text, re.DOTALL)]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        labels = [
            token if any(begin <= first < end for begin, end in spans) else -100
            for token, (first, _) in zip(ids, places, strict=True)
        ]
        rows.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(rows)


def train_with_trl(
    path: str,
    data: Dataset,
    ours: Any,
    into: Path,
    lora: LoraConfig,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    own_loss: bool = False,
    **options: Any,
) -> Any:
    """TRL's trainer, after training Hugging Face's model with the adapter's weights that ours begins with.

    Its loss is `textbook`, or with own_loss TRL's, which adds the load-balancing loss of experts.
    """
    unsloth_fast.compat.unpatch_trl()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), lora)
    set_peft_model_state_dict(model, get_peft_model_state_dict(ours.model))
    trainer = SFTTrainer(
        model,
        arguments(into, SFTConfig, **SETTINGS | options),
        train_dataset=data,
        processing_class=ours.processing_class,
        compute_loss_func=None if own_loss else textbook,
        **{"optimizers": (optimizer(model), None)} if optimizer else {},
    )
    assert not hasattr(trainer, "backend")
    trainer.train()
    return trainer


def textbook(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Cross entropy of the next token, by torch."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

"""Unsloth's published usage examples run unchanged."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

import unsloth_fast.trainer
from tests import tiny
from unsloth_fast import UnslothTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

EMBEDDING_RATE = """
from unsloth import FastLanguageModel
from unsloth.trainer import UnslothTrainer, UnslothTrainingArguments
from datasets import load_dataset

# Load model with embedding training
model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Llama-3.2-1B-Instruct",
    load_in_4bit=True,
)

# Include embeddings in training
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj",
                    "gate_proj", "up_proj", "down_proj",
                    "embed_tokens", "lm_head"],  # Train embeddings
)

# Configure with separate embedding learning rate
args = UnslothTrainingArguments(
    output_dir="outputs",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=2e-4,              # For LoRA parameters
    embedding_learning_rate=5e-5,    # Lower rate for embeddings
    num_train_epochs=1,
    fp16=True,
    logging_steps=10,
)

# Create trainer
trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    args=args,
)

# Train
trainer.train()
"""
STANDARD = """
from unsloth import FastLanguageModel
from trl import SFTTrainer, SFTConfig
from datasets import load_dataset

# Load and configure model
model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Llama-3.2-1B-Instruct",
    load_in_4bit=True,
)

model = FastLanguageModel.get_peft_model(model, r=16)

# Standard SFTTrainer works with Unsloth patches
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=2048,
    args=SFTConfig(
        output_dir="outputs",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        num_train_epochs=1,
        fp16=True,
    ),
)

trainer.train()
"""
PACKING = """
from unsloth import FastLanguageModel
from trl import SFTTrainer, SFTConfig

model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Llama-3.2-1B-Instruct",
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(model, r=16)

# Enable sample packing in SFTConfig
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        output_dir="outputs",
        packing=True,  # Enable sample packing
        per_device_train_batch_size=2,
        learning_rate=2e-4,
        max_steps=100,
    ),
)

# Unsloth auto-enables padding-free if packing is set
trainer.train()
"""
OWN_OPTIMIZER = """
from unsloth.trainer import UnslothTrainer, UnslothTrainingArguments

# The UnslothTrainer internally creates optimizer like this:
# (shown for understanding, not typical usage)

def _create_unsloth_optimizer(
    model,
    optimizer_cls,
    optimizer_kwargs,
    embedding_lr=5e-5,
):
    lr = optimizer_kwargs["lr"]
    weight_decay = optimizer_kwargs.get("weight_decay", 0.0)

    param_groups = {"non_embeddings": {}, "embeddings": {}}

    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if name.endswith("modules_to_save.default.weight"):
            param_groups["embeddings"][name] = param
        else:
            param_groups["non_embeddings"][name] = param

    optimizer_grouped_parameters = [
        {"params": list(param_groups["non_embeddings"].values()),
         "weight_decay": weight_decay, "lr": lr},
        {"params": list(param_groups["embeddings"].values()),
         "weight_decay": weight_decay, "lr": embedding_lr},
    ]

    return optimizer_cls(optimizer_grouped_parameters, **optimizer_kwargs)
"""
TRAIN = """
from unsloth.trainer import unsloth_train

# For older transformers versions with gradient accumulation bug
# This function provides a fixed training loop

# Note: For transformers > 4.45.2, this just calls trainer.train()
trainer_stats = unsloth_train(trainer)
"""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an example unchanged, except for the model's name, three steps instead of 100, and no fp16 on a CPU."""
    monkeypatch.setenv("UNSLOTH_BACKEND", "reference")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "unsloth", unsloth_fast)
    monkeypatch.setitem(sys.modules, "unsloth.trainer", unsloth_fast.trainer)
    folder = tiny.folder(tmp_path / "model", max_position_embeddings=4096)
    names: dict[str, Any] = {"dataset": Dataset.from_dict({"text": tiny.texts(12)})}

    def run(code: str) -> Any:
        code = code.replace("unsloth/Llama-3.2-1B-Instruct", folder).replace("max_steps=100", "max_steps=3")
        if not torch.cuda.is_available():  # transformers refuses fp16 and bf16 there
            code = code.replace("fp16=True", "fp16=False")
            code = code.replace('output_dir="outputs"', 'output_dir="outputs", use_cpu=True, bf16=False')
        exec(compile(code, "<example>", "exec"), names)
        return types.SimpleNamespace(**{name: value for name, value in names.items() if name.isidentifier()})

    return run


def test_the_example_with_an_embedding_rate(example: Any) -> None:
    """The embeddings are trained in full at their own rate, all other weights of the adapter at the base rate."""
    trainer = example(EMBEDDING_RATE).trainer
    assert trainer.model.get_base_model().is_loaded_in_4bit
    rates = {group["role"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"base": 2e-4, "embedding": 5e-5}
    assert trainer.state.global_step == 2 and trainer.padding_free
    assert json.loads(Path("outputs/checkpoint-2/adapter_config.json").read_text())["modules_to_save"] == [
        "embed_tokens",
        "lm_head",
    ]


def test_the_example_with_the_standard_trainer(example: Any) -> None:
    """It has old keywords. Batches are padded because TRL's configuration does not ask for padding-free ones."""
    trainer = example(STANDARD).trainer
    assert isinstance(trainer, SFTTrainer) and type(trainer) is UnslothTrainer
    assert (trainer.args.max_length, trainer.args.dataset_text_field) == (2048, "text")
    assert (trainer.args.packing, trainer.args.padding_free) == (False, False)
    assert trainer.state.global_step == 2 and trainer.backend.name == "reference"


def test_the_example_with_packing(example: Any) -> None:
    """Packed rows are padding-free automatically, and use the backend's attention."""
    trainer = example(PACKING).trainer
    assert trainer.args.packing and trainer.args.padding_free
    assert "seq_lengths" in trainer.train_dataset.column_names
    (batch,) = trainer.get_train_dataloader()
    assert batch["cu_seq_lens_q"][-1] == batch["input_ids"].numel() and "attention_mask" not in batch
    assert trainer.state.global_step == 3


def test_the_example_with_a_user_defined_optimizer(example: Any) -> None:
    """The user's optimizer replaces ours."""
    code = EMBEDDING_RATE.replace("trainer.train()", "")
    names = example(OWN_OPTIMIZER + code)
    mine = names._create_unsloth_optimizer(names.model, torch.optim.AdamW, {"lr": 2e-4})
    trainer = UnslothTrainer(names.model, names.args, train_dataset=names.dataset, optimizers=(mine, None))
    assert trainer.create_optimizer() is mine
    assert len(mine.param_groups[1]["params"]) == 2


def test_the_example_with_unsloth_train(example: Any) -> None:
    """It trains and returns the result of `train`."""
    names = example(PACKING.replace("trainer.train()", "") + TRAIN)
    assert names.trainer_stats.global_step == names.trainer.state.global_step == 3

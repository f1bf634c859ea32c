"""200 steps in bfloat16: the fast backend is as close to the reference as the reference in another order of sums."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests import tiny
from unsloth_fast import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

STEPS, ORDERS = 200, 6
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}


def documents() -> Dataset:
    """Words in arithmetic progressions, so that there is something to learn."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 45, (2000, 3), generator=draw).tolist()
    return Dataset.from_dict(
        {
            "text": [
                " ".join(f"w{(first + (1 + step % 3) * i) % 45}" for i in range(5 + length))
                for first, step, length in rows
            ]
        }
    )


def reorder(model: Any, seed: int) -> None:
    """Permute the hidden units and the units of every MLP: the same function, summed in another order."""
    draw = torch.Generator().manual_seed(seed)
    hidden, units = (torch.randperm(SIZES[size], generator=draw) for size in ("hidden_size", "intermediate_size"))
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        rows, columns = {"down_proj": (hidden, units), "o_proj": (hidden, None)}.get(kind, (None, hidden))
        if kind in ("gate_proj", "up_proj"):
            rows = units
        if hasattr(module, "lora_A"):
            permute(module.base_layer.weight, rows, columns)
            permute(module.lora_A["default"].weight, None, columns)
            permute(module.lora_B["default"].weight, rows, None)
        elif kind in ("embed_tokens", "lm_head"):
            permute(module.weight, None, hidden)
        elif kind.endswith("norm"):
            permute(module.weight, hidden, None)


def permute(weight: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> None:
    """Permute the rows and the columns of a weight in place; None keeps their order."""
    for axis, order in enumerate((rows, columns)):
        if order is not None:
            weight.data = weight.data.index_select(axis, order.to(weight.device))


def test_another_order_of_the_units_is_the_same_function() -> None:
    torch.manual_seed(0)
    model = FastLanguageModel.get_peft_model(tiny.model(**SIZES).double(), r=16, init_lora_weights=False)
    tokens = torch.arange(3, 43)[None]
    expected = model(tokens).logits
    reorder(model, 0)
    logits = model(tokens).logits
    assert expected.std() > 0.1 and not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)  # Llama's norms are float32


def losses(folder: str, backend: str, order: int | None = None) -> torch.Tensor:
    """The loss of each step of a packed LoRA training."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, dtype=torch.bfloat16, max_seq_length=256, load_in_4bit=False, backend=backend
    )
    model = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing=False, random_state=0)
    if order is not None:
        reorder(model, order)
    arguments = UnslothTrainingArguments(
        f"{folder}/{backend}-{order}", max_steps=STEPS, per_device_train_batch_size=2, packing=True, max_length=256,
        learning_rate=1e-3, lr_scheduler_type="constant", bf16=True, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, backend=backend,
    )  # fmt: skip
    trainer = UnslothTrainer(model, arguments, train_dataset=documents(), processing_class=tokenizer)
    trainer.train()
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log], dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fast_is_within_the_band_of_the_reference(
    tmp_path: Path, record_property: Callable[[str, float], None]
) -> None:
    folder = tiny.folder(tmp_path, dtype=torch.bfloat16, **SIZES)
    reference, fast = losses(folder, "reference"), losses(folder, "fast")
    band = max(float((losses(folder, "reference", order) - reference).norm()) for order in range(ORDERS))
    distance = float((fast - reference).norm())
    for name, value in (("first", reference[0]), ("last", reference[-1]), ("band", band), ("fast", distance)):
        record_property(name, float(value))
    assert reference[-1] < 0.7 * reference[0]
    # Twice, as gate G2 allows for the maximum of a small sample: the band is the largest of six distances.
    assert distance <= 2 * band

"""Small models with trained adapters, and what they compute."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from unsloth_fast import FastLanguageModel
from unsloth_fast.models.merging import merged_model

TOKENS = torch.tensor([[4, 8, 5, 9, 6, 12, 30]])
PLAIN: dict[str, Any] = {"load_in_4bit": False, "backend": "reference", "device_map": "cpu", "dtype": torch.float32}


def load(folder: str, **options: Any) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(folder, **PLAIN | options)


def trained(model: Any) -> Any:
    """The model with noise on its trained parameters, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape, generator=generator)
    return FastLanguageModel.for_inference(model)


def adapted(folder: str, four: bool = False, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = load(folder, load_in_4bit=four)
    return trained(FastLanguageModel.get_peft_model(model, r=4, **options)), tokenizer


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits.cpu()


def assert_near(found: Tensor, expected: Tensor, error: float = 2e-6) -> None:
    assert (found - expected).abs().max() <= error * expected.abs().max()


def merged(model: Any, folder: Path) -> Any:
    """The model merged in float32, saved, and loaded by plain transformers."""
    merged_model(model, torch.float32).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())

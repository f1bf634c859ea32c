"""Small models loaded from a folder, with or without adapters: how they are trained a little, and what they compute."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from unsloth_fast import FastLanguageModel
from unsloth_fast.models.head import without_adapter
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


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(model: Any) -> Any:
    """The model after one step that changes every trained parameter by 0.05."""
    loss_and_gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad.sign() * 0.05
    return model.eval()


def layers_of(model: Any) -> Any:
    return without_adapter(model).model.layers


def trained_names(model: nn.Module) -> set[str]:
    """The parameters that are trained, without the prefix of peft."""
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


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

"""A tiny model with LoRA on its linear layers: what changes it, and how its results are compared with peft's own."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests import tiny

TOKENS = torch.arange(40).reshape(2, 20)


def adapted(dtype: torch.dtype = torch.float64, base: Any = None, **options: Any) -> PeftModel:
    """A tiny model with LoRA on every linear layer; no adapter is zero."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options)
    torch.manual_seed(1)
    model = get_peft_model(base or tiny.model("llama", dtype), config)
    randomise(model)
    return model


def randomise(model: PeftModel) -> None:
    """Give every lora_B, which is initialised to zero, random weights."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)


def run(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of the model's own loss."""
    model.zero_grad()
    torch.manual_seed(3)  # for dropout
    outputs = model(TOKENS, labels=TOKENS)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach(), gradients


def twice(self: Any, *inputs: Any) -> Tensor:
    """The forward that somebody gives a layer."""
    return 2 * type(self).forward(self, *inputs)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a forward of somebody else's": lambda layer: setattr(layer, "forward", MethodType(twice, layer)),
    "a hook": lambda layer: layer.register_forward_hook(lambda module, inputs, output: 2 * output),
    "a hook of the backward pass": lambda layer: layer.register_full_backward_hook(lambda _, g, __: (2 * g[0],)),
}


def disabled(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def merged(model: PeftModel) -> None:
    model.merge_adapter()


def second(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    randomise(model)


def assert_as_before(model: PeftModel, expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    logits, gradients = run(model)
    torch.testing.assert_close(logits, expected[0], rtol=1e-9, atol=1e-9)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (gradients[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-18, name


def assert_as_peft_after(change: Callable[[PeftModel], None], model: PeftModel, untouched: PeftModel) -> None:
    """Demand the results of peft's layers after a change of both models, and without peft's layers."""
    for one in (untouched, model):
        torch.manual_seed(4)
        change(one)
    with tiny.KeepFloat64(), torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, untouched(TOKENS).logits, rtol=1e-9, atol=1e-9)
        base: list[Any] = [one.unload() for one in (model, untouched)]
        torch.testing.assert_close(base[0](TOKENS).logits, base[1](TOKENS).logits, rtol=1e-9, atol=1e-9)


def add_adapter(model: PeftModel) -> None:
    """Add one of another rank and scaling."""
    torch.manual_seed(4)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=7, target_modules="all-linear"))
    randomise(model)


def assert_follows(*adapters: str, model: PeftModel, expected: PeftModel) -> None:
    """Demand the results of peft's layers with each of the adapters, one after the other."""
    with tiny.KeepFloat64():
        for name in adapters:
            for one in (model, expected):
                one.set_adapter(name)
            assert_as_before(model, run(expected))

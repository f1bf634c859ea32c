"""Linear layers under LoRA, and what the backward pass makes again: peft's own forward is the truth."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests import tiny
from unsloth_fast import FastLanguageModel, backends
from unsloth_fast.models import place
from unsloth_fast.models.remade import remade

REFERENCE = backends.resolve("reference")
TOKENS = torch.arange(40).reshape(2, 20)


def adapted(dtype: torch.dtype = torch.float64, base: Any = None, **options: Any) -> PeftModel:
    """A tiny model with LoRA on every linear layer, whose adapters do something."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options)
    torch.manual_seed(1)
    model = get_peft_model(base or tiny.model("llama", dtype), config)
    randomise(model)
    return model


def randomise(model: PeftModel) -> None:
    """Give every lora_B, which starts at zero, some weights."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)


def run(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of the model's own loss."""
    model.zero_grad()
    torch.manual_seed(3)  # for dropout
    outputs = model(TOKENS, labels=TOKENS)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach(), gradients


def assert_as_before(model: torch.nn.Module, rtol: float, dtype: torch.dtype = torch.float64) -> None:
    """Placing the reference changes nothing but rounding."""
    with tiny.KeepFloat64() if dtype == torch.float64 else nullcontext():
        logits, gradients = run(model)
        place(model, REFERENCE)
        after, found = run(model)
    torch.testing.assert_close(after, logits, rtol=rtol, atol=rtol * logits.abs().max().item())
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * gradient.abs().max().item())


def test_layer_and_adapter_in_one_operation() -> None:
    """Seven layers in each of two blocks; float64 to rounding."""
    model = adapted()
    assert place(model, REFERENCE)["lora_linear"] == 14
    assert_as_before(adapted(), 1e-12)


def disabled(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def merged(model: PeftModel) -> None:
    model.merge_adapter()


def second(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    randomise(model)


@pytest.mark.parametrize("change", [disabled, merged, second], ids=lambda change: change.__name__)
def test_other_states_are_left_to_peft(change: Callable[[PeftModel], None]) -> None:
    """No active adapter, one that is in the weights, or two."""
    model = adapted()
    change(model)
    if change is second:
        return assert_as_before(model, 1e-12)
    with torch.no_grad(), tiny.KeepFloat64():
        expected = model(TOKENS).logits
        place(model, REFERENCE)
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-12, atol=1e-12)
    return None


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_are_left_to_peft(options: dict[str, Any]) -> None:
    """The same random numbers and all."""
    assert_as_before(adapted(**options).train(), 1e-12)


def test_autocast_computes_in_its_dtype_from_float32_adapters() -> None:
    """As peft with all its casts: bfloat16 products, gradients of float32 weights in float32, off by rounding alone."""
    model = adapted(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = run(model)
        place(model, REFERENCE)
        after, found = run(model)
    assert after.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    # Eight bits, some ten roundings deep: a few percent of the largest. Twice as much where both ways are rounded.
    torch.testing.assert_close(after, logits, rtol=0, atol=0.05 * logits.abs().max().item())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0.1 * gradient.abs().max().item(), msg=name)


def test_four_bits(tmp_path: Any) -> None:
    """The layer is bitsandbytes' own, the adapter is added without casting what it is added to."""
    pytest.importorskip("bitsandbytes")
    model, _ = FastLanguageModel.from_pretrained(
        tiny.folder(tmp_path), load_in_4bit=True, dtype=torch.float32, backend="reference"
    )
    assert_as_before(adapted(base=model), 1e-5, torch.float32)


@pytest.fixture
def gated() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x, what is made from it, and a weight."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, requires_grad=True)
    yield x, x.sigmoid() * 2, torch.randn(5, 4, requires_grad=True)


def test_what_can_be_made_again_is_not_saved(gated: tuple[Tensor, Tensor, Tensor]) -> None:
    """The gradients keep their bits; a product saves the recipe, and itself saves its other factor."""
    x, made, weight = gated
    calls = []

    def make() -> Tensor:
        calls.append(None)
        return x.detach().sigmoid() * 2

    expected = torch.autograd.grad((made @ weight).sum(), [x, weight], retain_graph=True)
    with remade(made, make):
        product = made.view(3, 5) @ weight
    assert isinstance(product.grad_fn._raw_saved_self.data, torch.Size)  # pyright: ignore
    found = torch.autograd.grad(product.sum(), [x, weight])
    assert len(calls) == 1
    assert all(map(torch.equal, found, expected))


def test_hooks_that_are_there_keep_the_tensors(gated: tuple[Tensor, Tensor, Tensor]) -> None:
    """A checkpoint or an offload decides for itself."""
    _, made, weight = gated
    seen = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor), remade(made, list):
        (made @ weight).sum().backward()
    assert any(tensor.data_ptr() == made.data_ptr() for tensor in seen)

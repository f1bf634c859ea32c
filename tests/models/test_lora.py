"""Linear layers under LoRA, and what the backward pass makes again: peft's own forward is the truth."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests import tiny
from unsloth_fast import FastLanguageModel, backends
from unsloth_fast.models import place
from unsloth_fast.models.remade import remade, remakeable

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
def sources() -> list[Tensor]:
    """x, and two weights that what is made from it meets."""
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in ((3, 5), (5, 4), (5, 4))]


def doubled(x: Tensor, calls: list[None] | None = None) -> Tensor:
    """What is made from x, and its recipe, which notes its calls."""

    def make() -> Tensor:
        (calls if calls is not None else []).append(None)
        return x.detach().sigmoid() * 2

    return remakeable(x.sigmoid() * 2, make)


def test_what_can_be_made_again_is_not_saved(sources: list[Tensor]) -> None:
    """Products save the recipe, and their other factors themselves; it is made once for all, and the bits stay."""
    x, left, right = sources
    made = doubled(x)
    expected = torch.autograd.grad((made @ left + made @ right).sum(), sources)
    calls: list[None] = []
    made = doubled(x, calls)
    with remade(made):
        products = made.view(3, 5) @ left, made @ right
    assert all(isinstance(product.grad_fn._raw_saved_self.data, torch.Size) for product in products)  # type: ignore
    for passes in (1, 2):
        found = torch.autograd.grad(sum(products).sum(), sources, retain_graph=True)  # type: ignore
        assert len(calls) == passes
        assert all(map(torch.equal, found, expected))


def test_hooks_that_are_there_keep_the_tensors(sources: list[Tensor]) -> None:
    """A checkpoint or an offload decides for itself."""
    x, left, _ = sources
    made = doubled(x)
    seen: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor), remade(made):
        (made @ left).sum().backward()
    assert any(tensor.data_ptr() == made.data_ptr() for tensor in seen)


@pytest.mark.parametrize("written_over", [False, True])
def test_what_cannot_be_made_again_is_saved(sources: list[Tensor], written_over: bool) -> None:
    """What has no recipe, and what was written over since, which its recipe would undo."""
    x, left, _ = sources
    made = doubled(x).mul_(3) if written_over else x.sigmoid() * 2
    with remade(made):
        product = made @ left
    assert torch.equal(product.grad_fn._saved_self, made)  # type: ignore


def test_norms_and_activations_are_made_again() -> None:
    """Once a backward pass each, as projections share it; not the first norm, as no gradient is for its input."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            calls[name] += 1
            return getattr(REFERENCE.kernels, name)(*arguments, **options)

        return call

    names = ("rms_norm", "swiglu")
    kernels = SimpleNamespace(**vars(REFERENCE.kernels) | {name: counted(name) for name in names})
    model = adapted()
    place(model, replace(REFERENCE, kernels=kernels))
    layers = model.config.num_hidden_layers
    loss = model(TOKENS).logits.sum()
    assert calls == {"rms_norm": 2 * layers + 1, "swiglu": layers}
    loss.backward()
    assert calls == {"rms_norm": 4 * layers, "swiglu": 2 * layers}

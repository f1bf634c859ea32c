"""MLPs whose three layers have LoRA as one operation: when it is called, and what is computed where it is not."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests import tiny
from tests.models.with_lora import (
    CHANGES,
    adapted,
    add_adapter,
    assert_as_before,
    assert_as_peft_after,
    assert_follows,
    disabled,
    merged,
    run,
    second,
)
from unsloth_fast import backends
from unsloth_fast.models import place

REFERENCE = backends.resolve("reference")
MLP = "base_model.model.model.layers.1.mlp"
PARTS = ("act_fn", *(f"down_proj{part}" for part in ("", ".base_layer", ".lora_A.default", ".lora_B.default")))


def counted(model: PeftModel) -> list[Tensor]:
    """Place the reference; the inputs of the calls of lora_mlp from now on."""
    calls: list[Tensor] = []

    def lora_mlp(x: Tensor, *others: Any, **options: Any) -> Tensor:
        calls.append(x)
        return REFERENCE.kernels.lora_mlp(x, *others, **options)

    kernels = SimpleNamespace(**vars(REFERENCE.kernels) | {"lora_mlp": lora_mlp})
    assert place(model, replace(REFERENCE, kernels=kernels))["lora_mlp"] == 2
    return calls


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_values_and_gradients_are_the_untouched_models_in_float64(family: str) -> None:
    """Every adapter has its gradient, under SiLU and GELU by tanh. Llama is tested with checkpointing too."""
    model = adapted(base=tiny.model(family, torch.float64))
    with tiny.KeepFloat64():
        expected = run(model)
        calls = counted(model)
        assert_as_before(model, expected)
        assert len(calls) == 2
        if family != "llama":
            return
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        assert_as_before(model, expected)
        assert len(calls) == 2 + 4


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", CHANGES)
def test_hooks_and_forwards_inside_of_it_are_called(part: str, change: str) -> None:
    """Whether they came before or after the operation; the MLP of the other layer stays one operation."""
    for before in (True, False):
        changed, model = adapted(), adapted()
        CHANGES[change](changed.get_submodule(f"{MLP}.{part}"))
        if before:
            CHANGES[change](model.get_submodule(f"{MLP}.{part}"))
            place(model, REFERENCE)
        else:
            calls = counted(model)
            CHANGES[change](model.get_submodule(f"{MLP}.{part}"))
        with tiny.KeepFloat64():
            assert_as_before(model, run(changed))
        assert before or len(calls) == 1


@pytest.mark.parametrize("change", [disabled, merged, second], ids=lambda change: change.__name__)
def test_adapters_that_change_after_the_placement(change: Callable[[PeftModel], None]) -> None:
    """Two active ones, a merged one and none are peft's; so is the model without peft's layers."""
    changed, model = adapted(), adapted()
    calls = counted(model)
    assert_as_peft_after(change, model, changed)
    assert not calls


def test_another_adapter_that_becomes_active() -> None:
    """The operation takes its weights and its scaling, without a new placement."""
    models = adapted(), adapted()
    for model in models:
        add_adapter(model)
    calls = counted(models[1])
    assert_follows("other", "default", model=models[1], expected=models[0])
    assert len(calls) == 4


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_do_more_are_peft_s(options: dict[str, Any]) -> None:
    models = [adapted(**options).train() for _ in range(2)]
    calls = counted(models[1])
    with tiny.KeepFloat64():
        assert_as_before(models[1], run(models[0]))
    assert not calls


@pytest.mark.parametrize("layer", ["up_proj", "down_proj"])
def test_an_mlp_with_a_layer_without_lora_is_separate(layer: str) -> None:
    """Gate and up are lora_linears if both have LoRA, as q, k and v; o and the other layers are by themselves."""
    placed = place(adapted(exclude_modules=[layer]), REFERENCE)
    assert placed["swiglu"] == 2 and "lora_mlp" not in placed
    assert (placed["lora_linears"], placed["lora_linear"]) == ((4, 2) if layer == "down_proj" else (2, 6))


@pytest.mark.parametrize("setting", ["lora_mlp", "lora_linear", "swiglu"])
def test_a_setting_for_a_part_separates_the_operation(setting: str) -> None:
    """Each part then has the backend of its own setting, and a setting of geglu concerns other MLPs."""
    placed = place(adapted(torch.float32), backends.resolve(f"fast,{setting}=reference"))
    together = 0 if setting == "lora_linear" else 4  # q, k and v; gate and up
    assert (placed["swiglu"], placed["lora_linear"]) == (2, 4 if together else 14) and "lora_mlp" not in placed
    assert placed.get("lora_linears", 0) == together
    assert place(adapted(torch.float32), backends.resolve("fast,geglu=reference"))["lora_mlp"] == 2


def test_the_fast_kernels_are_as_close_to_float64_as_the_model() -> None:
    """The error of all gradients together is at most twice the untouched float32 model's own."""
    with tiny.KeepFloat64():
        _, truth = run(adapted())
    model = adapted(torch.float32)
    _, own = run(model)
    assert place(model, backends.resolve("fast"))["lora_mlp"] == 2
    _, found = run(model)
    errors = [sum(float((one[name] - exact).norm()) ** 2 for name, exact in truth.items()) for one in (found, own)]
    assert 0 < errors[0] <= 4 * errors[1]


def test_the_product_of_gate_and_up_is_not_saved() -> None:
    """A placed MLP keeps only gate and up between the layers."""
    model: Any = adapted(torch.float32)
    place(model, backends.resolve("fast"))
    mlp, kept = model.get_submodule(MLP), list[Tensor]()
    inner = mlp.gate_proj.out_features
    x = torch.randn(2, 8, model.config.hidden_size, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mlp(x)
    assert sum(tensor.nbytes for tensor in kept if tensor.numel() == 16 * inner) == 2 * 16 * inner * 4
    assert inner != model.config.hidden_size

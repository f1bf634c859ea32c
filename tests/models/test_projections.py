"""Layers with LoRA that read the same tensor as one operation: when it is called, and what is computed otherwise."""

import contextlib
import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import silu

from tests import tiny
from tests.models.with_lora import (
    CHANGES,
    TOKENS,
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
from unsloth_fast.models.projections import shared_layers

REFERENCE = backends.resolve("reference")
ATTENTION = "base_model.model.model.layers.1.self_attn"


def counted(model: nn.Module, outputs: list[Any] | None = None) -> list[int]:
    """Place the reference; how many layers each call of lora_linears computes from now on; references to results."""
    calls: list[int] = []

    def lora_linears(x: Tensor, weight: Any, *others: Any) -> Any:
        calls.append(len(weight))
        found = REFERENCE.kernels.lora_linears(x, weight, *others)
        if outputs is not None:
            outputs.append([weakref.ref(one) for one in found])
        return found

    kernels = SimpleNamespace(**vars(REFERENCE.kernels) | {"lora_linears": lora_linears})
    place(model, replace(REFERENCE, kernels=kernels))
    return calls


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_values_and_gradients_are_the_untouched_models_in_float64(family: str) -> None:
    """Every adapter has its gradient. Two families are tested with checkpointing too, where layers run again."""
    model = adapted(base=tiny.model(family, torch.float64))
    with tiny.KeepFloat64():
        expected = run(model)
        calls = counted(model)
        assert_as_before(model, expected)
        assert calls == [3, 3]
        if family not in ("llama", "qwen3"):
            return
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        assert_as_before(model, expected)
        assert calls == [3] * 6


@pytest.mark.parametrize(("layers", "calls"), [("qkv", [3, 3]), ("qv", [2, 2]), ("kv", [2, 2]), ("q", []), ("ko", [])])
def test_any_two_layers_are_enough(layers: str, calls: list[int]) -> None:
    """LoRA on queries and values is peft's default; the output projection reads another tensor."""
    config = LoraConfig(r=4, target_modules=[f"{layer}_proj" for layer in layers], init_lora_weights=False)
    model: Any = inject_adapter_in_model(config, tiny.model("llama", torch.float64))
    with tiny.KeepFloat64():
        expected = run(model)
        seen = counted(model)
        assert_as_before(model, expected)
    assert seen == calls


@pytest.mark.parametrize("part", ["q_proj", "k_proj.base_layer", "v_proj.lora_A.default", "v_proj.lora_B.default"])
@pytest.mark.parametrize("change", CHANGES)
def test_hooks_and_forwards_inside_of_it_are_called(part: str, change: str) -> None:
    """Whether they came before or after the operation; the two other layers stay one operation."""
    for before in (True, False):
        changed, model = adapted(), adapted()
        CHANGES[change](changed.get_submodule(f"{ATTENTION}.{part}"))
        if before:
            CHANGES[change](model.get_submodule(f"{ATTENTION}.{part}"))
        calls = counted(model)
        if not before:
            CHANGES[change](model.get_submodule(f"{ATTENTION}.{part}"))
        with tiny.KeepFloat64():
            assert_as_before(model, run(changed))
        assert calls == [3, 2]


@pytest.mark.parametrize("change", [disabled, merged, second], ids=lambda change: change.__name__)
def test_adapters_that_change_after_the_placement(change: Callable[[PeftModel], None]) -> None:
    """Two active ones, a merged one and none are peft's; so is the model without peft's layers."""
    changed, model = adapted(), adapted()
    calls = counted(model)
    assert_as_peft_after(change, model, changed)
    assert not calls


def test_another_adapter_that_becomes_active_between_two_calls() -> None:
    """The operation takes its weights and its scaling, without a new placement."""
    models = adapted(), adapted()
    for model in models:
        add_adapter(model)
    calls = counted(models[1])
    assert_follows("other", "default", "other", model=models[1], expected=models[0])
    assert calls == [3] * 6


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_do_more_are_peft_s(options: dict[str, Any]) -> None:
    """The random numbers of dropout are drawn in the order of the calls."""
    models = [adapted(**options).train() for _ in range(2)]
    calls = counted(models[1])
    with tiny.KeepFloat64():
        assert_as_before(models[1], run(models[0]))
    assert not calls


@pytest.mark.parametrize("setting", ["lora_linears", "lora_linear"])
def test_a_setting_for_a_part_separates_the_operation(setting: str) -> None:
    """A setting of another operation does not."""
    model = adapted(torch.float32)
    placed = place(model, backends.resolve(f"fast,{setting}=reference"))
    assert "lora_linears" not in placed and placed["lora_linear"] == (8 if setting == "lora_linears" else 14)
    assert place(model, backends.resolve("fast,rope=reference"))["lora_linears"] == 2


def test_the_fast_kernels_are_as_close_to_float64_as_the_model() -> None:
    """The error of all gradients together is at most twice the untouched float32 model's own."""
    with tiny.KeepFloat64():
        _, truth = run(adapted(exclude_modules=["down_proj"]))
    model = adapted(torch.float32, exclude_modules=["down_proj"])
    _, own = run(model)
    assert place(model, backends.resolve("fast"))["lora_linears"] == 4
    _, found = run(model)
    errors = [sum(float((one[name] - exact).norm()) ** 2 for name, exact in truth.items()) for one in (found, own)]
    assert 0 < errors[0] <= 4 * errors[1]


def test_a_layer_that_is_called_by_itself() -> None:
    """Between the passes of the attention, with the same tensor, and in another order."""
    model: Any = adapted()
    attention, x = model.get_submodule(ATTENTION), torch.randn(2, 3, model.config.hidden_size, dtype=torch.float64)
    names = ("v_proj", "q_proj", "k_proj")
    expected = {name: attention.get_submodule(name)(x) for name in names}
    calls = counted(model)
    for name in names:
        torch.testing.assert_close(attention.get_submodule(name)(x), expected[name], rtol=1e-12, atol=1e-12)
    assert not calls


def test_results_are_freed_when_the_forward_drops_them() -> None:
    """Queries and keys before the rotation are gone when the output is projected, and all when the model returns."""
    model: Any = adapted(torch.float32)
    outputs: list[Any] = []
    counted(model, outputs)
    alive: list[list[bool]] = []
    for layer in model.base_model.model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda *_: alive.append([one() is not None for one in outputs[-1]])
        )
    with torch.no_grad():
        model(TOKENS)
    assert [kept[:2] for kept in alive] == [[False, False]] * 2
    assert not any(one() is not None for each in outputs for one in each)


def test_a_copy_uses_its_own_layers() -> None:
    """Its placed forward is bound to the copy."""
    model = adapted()
    calls = counted(model)
    twin = copy.deepcopy(model)
    with tiny.KeepFloat64():
        expected = run(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        calls.clear()
        assert_as_before(twin, expected)
    assert calls == [3, 3]


def test_the_placed_forward_compiles_without_a_graph_break() -> None:
    model = adapted(torch.float32)
    assert place(model, REFERENCE)["lora_linears"] == 2
    expected = model(TOKENS).logits
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(TOKENS).logits, expected)


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    """The prompts are padded on the left."""
    model: Any = adapted(torch.float32).eval()
    tokens, mask = torch.arange(3, 15).reshape(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=tokens, **options)
    calls = counted(model)
    assert torch.equal(model.generate(input_ids=tokens, **options), expected)
    assert calls == [3] * 2 * 8


def test_an_exception_between_the_projections_leaves_nothing_behind() -> None:
    """The next call computes its own projections."""
    model: Any = adapted(torch.float32)
    outputs: list[Any] = []
    counted(model, outputs)
    expected = model(TOKENS).logits
    rotary: Any = model.base_model.model.model.rotary_emb
    outputs.clear()
    with contextlib.suppress(ValueError), torch.no_grad():
        handle = rotary.register_forward_hook(lambda *_: (torch.zeros(1),))  # no cos and sin to unpack
        model(TOKENS)
    handle.remove()
    assert len(outputs) == 1 and not any(one() is not None for one in outputs[0])
    assert torch.equal(model(TOKENS).logits, expected)


class Module(nn.Module):
    """Three linear layers; `forward` is that of a subclass. With a parameter it cannot be an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.scale, self.gated = nn.Parameter(torch.ones(())), True


class Straight(Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), silu(self.b(x))
        return left * right + self.c(x)


class Sequential(Module):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.b(x))


class Renewed(Module):
    def forward(self, x: Tensor) -> Tensor:
        left = self.a(x)
        x = x + 1
        return left * self.b(x) * self.c(x)


class InPlace(Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        left = self.a(x)
        x.data.add_(1)
        return left * self.b(x) * self.c(self.b(x))


class OfTheModule(Module):
    def forward(self, x: Tensor) -> Tensor:
        left = self.a(x)
        if self.gated:
            left = left * self.b(x)
        return left + self.c(left)


class OfTheModuleAlone(Module):
    def forward(self, x: Tensor, other: Any = None) -> Tensor:
        y = self.c(x)
        if not self.gated:  # without `other`, the calls would fail
            y = self.a(other) * self.b(other)
        return y


class ByAView(Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        view = x.data[0]
        left = self.a(x)
        view += 1
        return left * self.b(x)


class OfTheCall(Module):
    def forward(self, x: Tensor) -> Tensor:
        left = self.a(x)
        if x.shape[0] > 1:
            left = left * self.b(x)
        return left + (self.c(x) if len(x) > 1 else 0)


class Deferred(Module):
    def forward(self, x: Tensor) -> Tensor:
        later = lambda: self.b(x)  # noqa: E731
        each = [self.c(x) for x in (x + 1, x + 2)]
        return self.a(x) + later() + each[0] * each[1]


class InAContext(Module):
    def forward(self, x: Tensor) -> Tensor:
        left = self.a(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return left + self.b(x) * self.c(x)


class Twice(Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x) + self.a(x)


class TwoInputs(Module):
    def forward(self, x: Tensor) -> Tensor:
        other = x + 1
        return self.a(other) + self.b(x) * self.c(x)


FORWARDS: dict[type[Module], str] = {
    Straight: "abc", Sequential: "", Renewed: "", InPlace: "", ByAView: "", OfTheModule: "ab",
    OfTheModuleAlone: "", OfTheCall: "", Deferred: "", InAContext: "", Twice: "ab", TwoInputs: "bc",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "layers"), FORWARDS.items())
def test_layers_whose_input_is_the_same_tensor(kind: type[Module], layers: str) -> None:
    """Values and gradients of any forward are as before, also where a module computes some of its layers together."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["a", "b", "c"], init_lora_weights=False)
    module: Any = inject_adapter_in_model(config, kind().double())
    assert "".join(layer.name for layer in shared_layers(module, REFERENCE)) == layers
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]

    def results() -> list[Tensor]:
        y = module(x).double()
        return [y, *(one for one in torch.autograd.grad(y.sum(), leaves, allow_unused=True) if one is not None)]

    expected, calls = results(), counted(module)
    torch.testing.assert_close(results(), expected, rtol=1e-12, atol=1e-12)
    assert calls == ([len(layers)] if layers else [])

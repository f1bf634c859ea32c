"""Families that people fine-tune, and a class that transformers does not have: what is placed computes the same."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from tests import tiny
from tests.models import zoo
from tests.models.families import FAMILIES, batch, build, error, step
from tests.models.test_attention import LENGTHS
from tests.models.test_documents import assert_alone
from unsloth_fast import backends
from unsloth_fast.models import place
from unsloth_fast.models.head import add_loss, without_adapter
from unsloth_fast.models.interface import examine, stacks_of

pytestmark = pytest.mark.filterwarnings("ignore")

REFERENCE = backends.resolve("reference")
KERNELS = {name: kernel for name, kernel in vars(REFERENCE.kernels).items() if name != "cross_entropy"}
WITHOUT_LOGITS = replace(REFERENCE, kernels=SimpleNamespace(**KERNELS))
LORA: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": ["router"], "init_lora_weights": False}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_it_did(name: str) -> None:
    """Loss and every gradient are the untouched model's in float64, whole and accumulated; each part is placed."""
    check(build(name), FAMILIES[name].placed)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.linear is not None])
def test_adapters_of_a_family_compute_what_they_did(name: str, tmp_path: Path) -> None:
    """And peft loads what was saved, bit for bit."""
    family = FAMILIES[name]
    model = get_peft_model(build(name), LoraConfig(r=4, **LORA))
    wrappers = [part for part in model.modules() if isinstance(part, ParamWrapper)]
    of_experts = sum(hasattr(part.get_base_layer(), "gate_up_proj") for part in wrappers)  # 0 where peft takes none
    expected = Counter(family.placed) + Counter({"lora_linear": family.linear, "grouped_gemm": of_experts})
    whole = sum(map(is_mlp_of_adapters, model.modules()))
    together = [count for part in model.modules() if (count := projections_with_adapters(part)) > 1]
    expected.subtract({"lora_linear": 3 * whole + sum(together), family.gate: whole})
    check(model, dict(+(expected + Counter({"lora_mlp": whole, "lora_linears": len(together)}))))
    model.save_pretrained(str(tmp_path))
    loaded = dict(PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters() if p.requires_grad)


def projections_with_adapters(module: Any) -> int:
    """How many of its projections of the hidden states to queries, keys, values and a gate, or to what makes these."""
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "q_a_proj", "kv_a_proj_with_mqa")
    return sum(isinstance(child, LoraLayer) for name, child in module.named_children() if name in names)


def is_mlp_of_adapters(module: Any) -> bool:
    """Whether it has three layers with LoRA, between the same two sizes."""
    layers: list[Any] = [child for child in module.children() if isinstance(child, LoraLayer)]
    return len(layers) == 3 and len({frozenset((one.in_features, one.out_features)) for one in layers}) == 1


def check(model: Any, expected_operations: dict[str, Any]) -> None:
    tokens, labels = batch()
    with tiny.KeepFloat64():
        expected_loss, expected_gradients = step(model, tokens, labels)
        assert place(model, REFERENCE) == expected_operations
        add_loss(without_adapter(model), WITHOUT_LOGITS)
        whole = step(model, tokens, labels, backend_loss=True)
        accumulated = accumulate(model, tokens, labels)
    for loss, gradients in (whole, accumulated):
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        assert gradients.keys() == expected_gradients.keys() and gradients
        for name, gradient in expected_gradients.items():  # some are 0 but for rounding
            assert (gradients[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-17, name


def accumulate(model: Any, tokens: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The sum of a step of each row, whose loss is divided by the targets of all rows."""
    options = {"backend_loss": True, "num_items": int((labels[:, 1:] != -100).sum())}
    losses, gradients = 0.0, dict[str, Tensor]()
    for row, of_row in zip(tokens, labels, strict=True):
        loss, found = step(model, row[None], of_row[None], **options)
        losses += loss
        gradients |= {name: gradient + gradients.get(name, 0) for name, gradient in found.items()}
    return losses, gradients


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.model])
def test_packed_documents_of_a_family_equal_the_same_documents_alone(name: str) -> None:
    """No layer gets more than the bounds of the documents; or transformers keeps its masks, for the reason given."""
    model, foreign = build(name), FAMILIES[name].foreign
    if foreign is not None:
        (stack,) = (stack for stack in stacks_of(model) if stack.get_input_embeddings() is model.get_input_embeddings())
        assert examine(stack, "sdpa").foreign == foreign
        return
    sizes = assert_alone(model, FAMILIES[name].packed)
    assert set(sizes) == {4 * (len(LENGTHS) + 1)}


@pytest.mark.parametrize("family", ["phi3", "glm4", "gemma4", "llama4", "custom"])
def test_the_fast_kernels_are_as_close_to_float64_as_the_model(family: str) -> None:
    """The error of all gradients together is at most twice the untouched float32 model's own."""
    fast, (tokens, labels) = backends.resolve("fast"), batch()
    with tiny.KeepFloat64():
        _, truth = step(build(family), tokens, labels)
    model = build(family).float()
    _, own = step(model, tokens, labels)
    place(model, fast)
    add_loss(model, fast)
    _, found = step(model, tokens, labels, backend_loss=True)
    assert 0 < error(found, truth) <= 2 * error(own, truth)


def test_a_setting_for_swiglu_separates_the_fused_operation() -> None:
    """It governs the MLPs of Phi-3 too: the fused operation takes no other backend than its part."""
    for setting in ("swiglu", "fused_swiglu"):
        backend = backends.resolve(f"fast,{setting}=reference")
        assert place(build("phi3"), backend).keys() == {"rms_norm", "swiglu", "rope", "packed_attention"}


def test_an_adapter_on_another_layer_is_left_to_peft() -> None:
    """GPT-2 has layers of its own, with transposed weights."""
    model = get_peft_model(zoo.model("gpt2"), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    assert place(model, REFERENCE) == {}

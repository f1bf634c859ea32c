"""Placing operations under Hugging Face models: the untouched model is the truth."""

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.trainer.runs import arguments, build, textbook
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments, backends
from unsloth_fast.models import place, remove

REFERENCE = backends.resolve("reference")
TOKENS = torch.arange(40).reshape(2, 20)

# Of a model with two layers: norms, MLPs that gate with SiLU or, in Gemma, with GELU, and attentions.
ATTENTION = {"rope": 2, "packed_attention": 2}
COUNTS = {
    "llama": {"rms_norm": 5, "swiglu": 2} | ATTENTION,
    "mistral": {"rms_norm": 5, "swiglu": 2} | ATTENTION,
    "qwen2": {"rms_norm": 5, "swiglu": 2} | ATTENTION,
    "qwen3": {"rms_norm": 9, "swiglu": 2} | ATTENTION,
    "gemma": {"rms_norm": 5, "geglu": 2} | ATTENTION,
    "gemma2": {"rms_norm": 9, "geglu": 2} | ATTENTION,
    "gemma3": {"rms_norm": 13, "geglu": 2} | ATTENTION,
}


def run(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of the model's own loss."""
    model.zero_grad()
    outputs = model(TOKENS, labels=TOKENS)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_reference_gives_the_bits_of_hugging_face(family: str, dtype: torch.dtype) -> None:
    """Logits in every dtype, as the order of casts is the same; the parameters and their names stay as they are."""
    model = tiny.model(family, dtype)
    expected, _ = run(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert place(model, REFERENCE) == COUNTS[family]
    logits, _ = run(model)
    assert torch.equal(logits, expected)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_gradients_equal_hugging_face_in_float64(family: str) -> None:
    """To the bit as well: autograd sees the same steps. Head norms' rows are summed in another order: to rounding."""
    model = tiny.model(family, torch.float64)
    with tiny.KeepFloat64():
        expected_logits, expected = run(model)
        place(model, REFERENCE)
        logits, gradients = run(model)
    assert logits.dtype == torch.float64
    assert torch.equal(logits, expected_logits)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        rounding = 1e-14 if "q_norm" in name or "k_norm" in name else 0.0
        torch.testing.assert_close(gradient, expected[name], rtol=rounding, atol=rounding)


def counting_backend(calls: list[str]) -> backends.Backend:
    """The reference, writing down each call."""

    def counted(name: str) -> object:
        def call(*args: object, **options: object) -> Tensor:
            calls.append(name)
            return getattr(REFERENCE.kernels, name)(*args, **options)

        return call

    kernels = types.SimpleNamespace(**{name: counted(name) for name in vars(REFERENCE.kernels)})
    return backends.Backend("counting", kernels, REFERENCE.training, "a test")


def test_each_placed_module_calls_the_operation_until_removed() -> None:
    """Once a module and forward; none after `remove`; placing twice is placing once. Attention is not packed here."""
    calls: list[str] = []
    model = tiny.model()
    place(model, counting_backend(calls))
    place(model, counting_backend(calls))
    model(TOKENS)
    assert [calls.count(name) for name in ("rms_norm", "swiglu", "rope")] == [5, 2, 2]
    assert len(calls) == 9
    remove(model)
    model(TOKENS)
    assert len(calls) == 9
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_deep_copy_uses_its_own_weights() -> None:
    """And is placed like the original."""
    calls: list[str] = []
    model = tiny.model()
    place(model, counting_backend(calls))
    twin = copy.deepcopy(model)
    expected = model(TOKENS).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    calls.clear()
    assert torch.equal(twin(TOKENS).logits, expected)
    assert len(calls) == 9


@pytest.mark.parametrize("placed_first", [False, True])
def test_under_peft(placed_first: bool) -> None:
    """LoRA on the projections of the MLP and norms under modules_to_save, whichever comes first."""

    def adapted(model: PreTrainedModel) -> torch.nn.Module:
        torch.manual_seed(1)
        config = LoraConfig(
            r=2, target_modules=["gate_proj", "up_proj", "down_proj"], modules_to_save=["norm"], init_lora_weights=False
        )
        return get_peft_model(model, config, adapter_name="cpt")

    expected, expected_gradients = run(adapted(tiny.model()))
    calls: list[str] = []
    model = tiny.model()
    if placed_first:
        place(model, counting_backend(calls))
        model = adapted(model)
    else:
        model = adapted(model)
        # Each norm is there twice, the frozen one and the one that is trained and called.
        assert place(model, counting_backend(calls)) == {"rms_norm": 10, "swiglu": 2, "lora_linear": 6} | ATTENTION
    logits, gradients = run(model)
    # Each MLP's norm and gate again for the backward passes of the projections that took them.
    assert (calls.count("rms_norm"), calls.count("swiglu")) == (5 + 2, 2 + 2)
    assert torch.equal(logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        # The gradient of what gate and up both take is four terms, added in another order.
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=2.0**-20 * gradient.abs().max().item())


# Below the longest text of 20 words.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    # Before transformers 5.23 its default, sdpa, leaves the cap on the scores out.
    "gemma2": {"sliding_window": 8, "attn_implementation": "eager"},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_lora_trains_as_with_plain_trl_in_float64(tmp_path: Path, family: str) -> None:
    """Three steps, documents end to end against padded ones, the head tied where the family ties it by default.

    Rounding is 1e-16; AdamW makes of it at most 1e-12, as test_trainer.py explains.
    """
    tied = tiny.FAMILIES[family][0]().tie_word_embeddings
    losses = []
    for trainer_kind, args_kind in ((UnslothTrainer, UnslothTrainingArguments), (SFTTrainer, SFTConfig)):
        model = tiny.model(family, torch.float64, tie_word_embeddings=tied, **WINDOWS.get(family, {}))
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        own_loss = {"compute_loss_func": textbook} if trainer_kind is SFTTrainer else {}
        with tiny.KeepFloat64():
            args = arguments(tmp_path, args_kind, max_steps=3)
            trainer = build(trainer_kind, args, model=get_peft_model(model, config), **own_loss)
            trainer.train()
        assert tied == (model.lm_head.weight is model.get_input_embeddings().weight)
        losses.append(trainer.losses)
    assert len(losses[0]) == 3 and len(set(losses[0])) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_compiles_whole() -> None:
    """No graph break in a placed model."""
    model = tiny.model()
    place(model, REFERENCE)
    expected = model(TOKENS).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(TOKENS).logits, expected)


def test_what_is_left_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """An MLP with another activation, a LayerNorm, an attention, and a module whose forward somebody has replaced.

    Placing once more says nothing, another backend what is placed, and a kind that is new is named alone.
    """
    model = tiny.model("gemma", hidden_act="relu")
    model.extra = torch.nn.LayerNorm(4)
    model.other = torch.nn.MultiheadAttention(4, 1)
    replaced = model.model.norm
    own = type(replaced).forward.__get__(replaced)
    replaced.forward = own
    with caplog.at_level("INFO"):
        assert place(model, REFERENCE) == {"rms_norm": 4} | ATTENTION
    assert replaced.forward is own
    assert [record.getMessage() for record in caplog.records] == [
        "backend reference placed under {'rope': 2, 'packed_attention': 2, 'rms_norm': 4}; "
        "left as they are: {'GemmaMLP': 2, 'GemmaRMSNorm': 1, 'LayerNorm': 1, 'MultiheadAttention': 1}"
    ]
    caplog.clear()
    with caplog.at_level("INFO"):
        place(model, REFERENCE)
        place(model, counting_backend([]))
        model.more = torch.nn.ModuleList([torch.nn.LayerNorm(4), torch.nn.GroupNorm(1, 4)])
        place(model, counting_backend([]))
    placed = "backend counting placed under {'rope': 2, 'packed_attention': 2, 'rms_norm': 4}"
    assert caplog.messages == [placed, f"{placed}; left as they are: {{'GroupNorm': 1}}"]
    remove(model)
    assert replaced.forward is own

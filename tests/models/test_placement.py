"""Operations placed under Hugging Face models, compared with the untouched model."""

import copy
import re
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from conformance.models.building import Subject
from tests import tiny
from tests.trainer.runs import arguments, build, textbook
from unsloth_fast import UnslothTrainer, UnslothTrainingArguments, backends
from unsloth_fast.models import place, remove

REFERENCE = backends.resolve("reference")
TOKENS = torch.arange(40).reshape(2, 20)

ATTENTION = {"rope": 2, "packed_attention": 2}  # the tiny models have two layers


def run(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of the model's own loss."""
    model.zero_grad()
    outputs = model(TOKENS, labels=TOKENS)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_reference_gives_the_bits_of_hugging_face(family: str, dtype: torch.dtype) -> None:
    """Logits are equal in every dtype, as the order of casts is the same; parameters and their names do not change."""
    model = tiny.model(family, dtype)
    expected, _ = run(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tiny_family = tiny.FAMILIES[family]
    counts = {"rms_norm": tiny_family.norms, tiny_family.gate: 2, tiny_family.rotation: 2, "packed_attention": 2}
    assert place(model, REFERENCE) == counts
    logits, _ = run(model)
    assert torch.equal(logits, expected)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_gradients_equal_hugging_face_in_float64(family: str) -> None:
    """Bits are equal, except that norms on the heads sum their rows in another order, hence up to rounding."""
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
    """The reference, with each call recorded."""

    def counted(name: str) -> object:
        def call(*args: object, **options: object) -> Tensor:
            calls.append(name)
            return getattr(REFERENCE.kernels, name)(*args, **options)

        return call

    kernels = types.SimpleNamespace(**{name: counted(name) for name in vars(REFERENCE.kernels)})
    return backends.Backend("counting", kernels, REFERENCE.training, "a test")


def test_each_placed_module_calls_the_operation_until_removed() -> None:
    """Each module calls it once per forward; placing twice is the same as placing once. The batch is not packed."""
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
    """The copy calls the same operations as the original."""
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
    """`place` may come before or after `get_peft_model`, with LoRA on the MLPs and norms under modules_to_save."""

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
        # Each norm exists twice: a frozen one, and one that is trained and called.
        assert place(model, counting_backend(calls)) == {"rms_norm": 10, "lora_mlp": 2} | ATTENTION
    logits, gradients = run(model)
    # The backward pass of an MLP recomputes the norm that was its input; placed before LoRA, the activation too.
    assert calls.count("rms_norm") == 5 + 2
    assert (calls.count("swiglu"), calls.count("lora_mlp")) == ((2 + 2, 0) if placed_first else (0, 2))
    assert torch.equal(logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        # The gradient of the input of gate and up is a sum of four terms, added in another order.
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=2.0**-20 * gradient.abs().max().item())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_lora_trains_as_with_plain_trl_in_float64(tmp_path: Path, family: str) -> None:
    """Three steps, concatenated documents against padded ones; the head is tied if the family ties it by default.

    Rounding is 1e-16; AdamW turns it into at most 1e-12, as test_trainer.py explains.
    """
    tied = tiny.FAMILIES[family].model_class.config_class().tie_word_embeddings
    losses = []
    for trainer_kind, args_kind in ((UnslothTrainer, UnslothTrainingArguments), (SFTTrainer, SFTConfig)):
        model = tiny.model(family, torch.float64, tie_word_embeddings=tied, **tiny.FAMILIES[family].limits)
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


def test_a_placed_model_compiles_without_a_graph_break() -> None:
    model = tiny.model()
    place(model, REFERENCE)
    expected = model(TOKENS).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(TOKENS).logits, expected)


def test_modules_left_unchanged_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """An MLP with another activation, a LayerNorm, an attention, a module whose forward is replaced; with reasons.

    Placing the same backend again logs nothing. Another backend logs what it placed, and classes not logged before.
    """
    model = tiny.model("gemma", hidden_act="relu")
    model.extra = torch.nn.LayerNorm(4)
    model.other = torch.nn.MultiheadAttention(4, 1)
    replaced = model.model.norm
    own = partial(type(replaced).forward, replaced)
    replaced.forward = own
    with caplog.at_level("INFO"):
        assert place(model, REFERENCE) == {"rms_norm": 4} | ATTENTION
    assert replaced.forward is own
    assert [re.sub(r"by \S+ at", "by X at", message) for message in caplog.messages] == [
        "backend reference: operations placed: {'rope': 2, 'packed_attention': 2, 'rms_norm': 4}; modules left "
        "unchanged: {'GemmaMLP (differs from every swiglu and geglu by X at least)': 2, \"GemmaRMSNorm (its forward is "
        'somebody else\'s)": 1, "LayerNorm (it has a bias; torch\'s operator is one kernel already)": 1, '
        "'MultiheadAttention (no operation computes it)': 1}"
    ]
    caplog.clear()
    with caplog.at_level("INFO"):
        place(model, REFERENCE)
        place(model, counting_backend([]))
        model.more = torch.nn.ModuleList([torch.nn.LayerNorm(4), torch.nn.GroupNorm(1, 4)])
        place(model, counting_backend([]))
    placed = "backend counting: operations placed: {'rope': 2, 'packed_attention': 2, 'rms_norm': 4}"
    assert caplog.messages == [
        placed,
        f"{placed}; modules left unchanged: {{'GroupNorm (no operation computes it)': 1}}",
    ]
    remove(model)
    assert replaced.forward is own


def test_what_joins_a_router_and_experts_is_logged_with_what_is_inside(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        place(Subject.named("gpt_oss").model(torch.float32, "cpu"), REFERENCE)
    reason = "no operation computes it as a whole; inside: moe_mlp"
    assert caplog.messages[-1].endswith(f"; modules left unchanged: {{'GptOssMLP ({reason})': 2}}")

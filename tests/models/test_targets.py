"""Which modules names, patterns and parts of a model stand for, and adapters that are there already."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.models import families, zoo
from tests.models.adapted import TOKENS, adapted, assert_near, load, logits_of, merged, trained_names
from tests.trainer.runs import arguments, build
from unsloth_fast import FastLanguageModel, FastModel, UnslothTrainer
from unsloth_fast.models.beside_experts import warn_of_layers_left

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def adapt(model: Any, **options: Any) -> Any:
    return FastModel.get_peft_model(model, r=2, use_gradient_checkpointing=False, **options)


def lora_paths(model: Any) -> set[str]:
    return {path for path, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


def last_names(paths: set[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ATTENTION | MLP),
        ({"finetune_language_layers": True}, ATTENTION | MLP),
        ({"finetune_mlp_modules": False}, ATTENTION),
        ({"finetune_attention_modules": False}, MLP),
        ({"target_modules": "all-linear", "finetune_attention_modules": False}, MLP),
        ({"target_modules": ["q_proj", "up_proj"], "finetune_mlp_modules": False}, {"q_proj"}),
        ({"target_modules": r".*\.(q_proj|fc1|down_proj)"}, {"q_proj", "down_proj"}),
        ({"target_modules": "all-linear"}, ATTENTION | MLP),
    ],
)
def test_only_the_parts_asked_for_of_the_text_model_get_an_adapter(flags: dict[str, Any], expected: set[str]) -> None:
    """The vision tower, whose layers have the same names, gets none; the saved configuration says so to plain peft."""
    model = adapt(zoo.empty("gemma3"), finetune_vision_layers=False, **flags)
    paths = lora_paths(model)
    assert last_names(paths) == expected
    assert all(path.startswith("model.language_model.layers.") for path in paths)
    assert len(paths) == 2 * len(expected)
    assert lora_paths(get_peft_model(zoo.empty("gemma3"), model.peft_config["default"])) == paths


def test_names_that_a_family_lacks_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = adapt(tiny.model(), target_modules=["q_proj", "in_proj", "w1"])
    assert last_names(lora_paths(model)) == {"q_proj"}
    assert "target_modules: the model has no in_proj, w1; LoRA on the rest" in caplog.text


def test_layers_that_a_family_has_in_one_are_found(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = adapt(zoo.empty("phi3"))
    assert last_names(lora_paths(model)) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert "k_proj is part of qkv_proj here, which gets LoRA" in caplog.text


NOTEBOOKS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXERS = "no LoRA on in_proj, input_linear, output_linear, which 'all-linear' adds, nor on out_proj, whose weights are"


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("granitemoehybrid", {}, MIXERS),
        ("granitemoehybrid", {"target_modules": NOTEBOOKS}, MIXERS),
        ("granitemoehybrid", {"exclude_modules": ["in_proj", "input_linear"]}, "no LoRA on output_linear, which "),
        ("gemma3n", {}, "no LoRA on altup_projections, altup_unembed_projections, linear_left, linear_right, "),
        ("granitemoehybrid", {"target_modules": ["q_proj"]}, None),
        ("granitemoehybrid", {"target_modules": "all-linear"}, None),
        ("granitemoehybrid", {"finetune_mlp_modules": False}, None),
        ("gemma3", {}, None),
        ("qwen3_moe", {}, None),
    ],
)
def test_layers_that_the_usual_names_leave_out_are_logged(
    name: str, options: dict[str, Any], left: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """One line names them if the user gave no names; routers and vision towers are not among them."""
    adapt(zoo.empty(name), **options)
    found = [line for line in caplog.messages if line.startswith("target_modules: no LoRA on ")]
    assert len(found) == (left is not None)
    assert left is None or found[0].startswith(f"target_modules: {left}")


def test_a_layer_that_is_read_gets_no_adapter(caplog: pytest.LogCaptureFixture) -> None:
    """Training calls Mamba's in_proj and reads its out_proj: an adapter there would not be trained."""
    model = adapt(zoo.empty("granitemoehybrid"), target_modules=["q_proj", "in_proj", "out_proj"])
    assert last_names(lora_paths(model)) == {"q_proj", "in_proj"}
    assert "target_modules: out_proj: no LoRA" in caplog.text
    with pytest.raises(ValueError, match=r"target_modules: got \['out_proj'\].*; allowed: .*in_proj"):
        adapt(zoo.empty("mamba2"), target_modules=["out_proj"])


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("options", [{}, {"finetune_vision_layers": False, "finetune_mlp_modules": True}])
def test_names_of_an_mlp_mean_the_weights_of_experts(options: dict[str, Any], layers: list[int] | None) -> None:
    """They mean these in the layers asked for, beside the shared expert, which has layers of its own."""
    model = adapt(zoo.empty("qwen2_moe"), layers_to_transform=layers, **options)
    found = {name.split(".lora_")[0] for name in trained_names(model)}
    expected = set()
    for layer in layers or [0, 1]:
        attention = {f"self_attn.{name}" for name in ATTENTION}
        shared = {f"mlp.shared_expert.{name}" for name in MLP}
        experts = {"mlp.experts", "mlp.experts.base_layer"}  # one wrapper per parameter
        expected |= {f"model.layers.{layer}.{name}" for name in attention | shared | experts}
    assert found == expected


BESIDE_EXPERTS = [f"model.layers.*.mlp.{part}{name}" for part in ("", "shared_experts.") for name in MLP]
LEFT = {
    "deepseek_v3": f"no LoRA on {', '.join(sorted(BESIDE_EXPERTS))}: peft takes these names for the experts' weights",
    "qwen2_moe": "no LoRA on the weights of model.layers.*.mlp.experts, only on dense layers beside them",
}


@pytest.mark.parametrize(
    ("family", "targets"), [("deepseek_v3", None), ("deepseek_v3", "all-linear"), ("qwen2_moe", "all-linear")]
)
def test_dense_layers_or_experts_that_peft_leaves_out_are_warned_of_once(
    family: str, targets: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a call, which may be repeated, or by a trainer."""

    def made() -> Any:
        return zoo.model(family) if family in zoo.ZOO else families.build(family).float()

    def said() -> int:
        return sum(message.startswith(f"target_modules: {LEFT[family]}") for message in caplog.messages)

    model = adapt(made(), target_modules=targets)
    assert said() == 1
    assert adapt(model, target_modules=targets) is model
    adapt(made(), target_modules=["o_proj"])
    assert said() == 1
    args = arguments(tmp_path, max_steps=1)
    names = targets or sorted(ATTENTION | MLP)
    build(UnslothTrainer, args, model=made(), peft_config=LoraConfig(r=2, target_modules=names))
    assert said() == 2


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [0]}, {"target_modules": ["o_proj"]}])
def test_nothing_is_said_where_dense_layers_and_experts_have_adapters_or_neither(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    adapt(zoo.model("qwen2_moe"), **options)
    assert not any("no LoRA on" in message for message in caplog.messages)


def test_nothing_is_said_of_experts_where_a_parameter_of_a_dense_layer_is_adapted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = get_peft_model(tiny.model(), LoraConfig(target_parameters=["mlp.gate_proj.weight"], target_modules=[]))
    warn_of_layers_left(model)
    assert caplog.messages == []


def test_attention_alone_leaves_the_experts_out() -> None:
    for options in ({"target_modules": ["q_proj"]}, {"finetune_mlp_modules": False}):
        assert not any("experts" in name for name in trained_names(adapt(zoo.empty("qwen3_moe"), **options)))


def test_experts_alone() -> None:
    """The MLPs of this family have no linear layer."""
    names = trained_names(adapt(zoo.empty("qwen3_moe"), finetune_attention_modules=False))
    assert names and all("mlp.experts" in name for name in names)


def test_dropout_on_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_dropout: got 0.1 with LoRA on experts.*; allowed: lora_dropout=False"):
        adapt(zoo.empty("qwen3_moe"), lora_dropout=0.1)
    adapt(zoo.empty("qwen3_moe"), lora_dropout=0.1, target_modules=["q_proj"])


def test_adapters_of_experts_are_saved_loaded_and_merged(tmp_path: Path) -> None:
    model, _ = adapted(zoo.folder(tmp_path / "base", "qwen3_moe"))
    logits = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(str(tmp_path / "adapter"))
    assert_near(logits_of(again.eval()), logits)
    assert_near(logits_of(merged(model, tmp_path / "merged")), logits, 1e-5)


def test_an_exclusion_of_the_users_holds_too() -> None:
    for excluded in (["k_proj"], r".*\.k_proj"):
        model = adapt(zoo.empty("mistral3"), target_modules=["q_proj", "k_proj"], exclude_modules=excluded)
        assert lora_paths(model) == {f"model.language_model.layers.{index}.self_attn.q_proj" for index in (0, 1)}


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_task_may_be_named(task: str | None) -> None:
    assert adapt(tiny.model(), task_type=task).peft_config["default"].task_type == "CAUSAL_LM"


SAME: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all-linear": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*layers\.0.*\.(q|k)_proj"},
    "layers": {"layers_to_transform": [1]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_an_adapter_with_these_values_is_trained_further(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], tied: bool
) -> None:
    """It was loaded here, by peft's own class, or just made; its weights do not change."""
    caplog.set_level(logging.INFO)
    folder = tiny.folder(tmp_path / "base", tie_word_embeddings=tied)
    made = adapt(load(folder)[0], **options)
    made.save_pretrained(tmp_path / "adapter")
    loaded, _ = load(str(tmp_path / "adapter"))
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    for model in (made, loaded, frozen):
        before = logits_of(model.eval())
        assert adapt(model, **options) is model
        assert trained_names(model) == trained_names(made) and model.training
        assert torch.equal(logits_of(model.eval()), before)
    assert caplog.text.count("it has the adapter 'default' with these values already") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 4}, "adapter of lora_alpha=16; allowed: one of lora_alpha=4, as in this call"),
        (
            {"target_modules": ["q_proj"]},
            r"target_modules=\['down_proj', .*; allowed: .*=\['q_proj'\]",
        ),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\[\]; allowed: one of modules_to_save=\['lm_head'\]"),
        ({"use_dora": True}, "adapter of use_dora=False; allowed: one of use_dora=True"),
    ],
)
def test_an_adapter_with_other_values_is_refused(options: dict[str, Any], message: str) -> None:
    model = adapt(tiny.model())
    before = trained_names(model)
    with pytest.raises(ValueError, match=message):
        adapt(model, **options)
    assert trained_names(model) == before


def test_an_adapter_that_is_not_lora_is_refused() -> None:
    model = get_peft_model(tiny.model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="model: got one with the adapter 'default' of type IA3Config; allowed: LoRA"):
        FastLanguageModel.get_peft_model(model)


def test_peft_loads_what_was_excluded(tmp_path: Path) -> None:
    """Plain peft loads the adapter of an image-text model on plain transformers."""
    folder = zoo.folder(tmp_path / "base", "mistral3")
    model, tokenizer = adapted(folder, finetune_vision_layers=False)
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    model.save_pretrained(tmp_path / "adapter")
    plain = type(model.get_base_model()).from_pretrained(folder)
    again = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert_near(again(TOKENS).logits, logits_of(model))

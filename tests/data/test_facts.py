"""The facts that decide about batching: read from a model or from its name, and from the arguments of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    RobertaForCausalLM,
)
from trl import SFTConfig

from conformance.models.shrinking import tiny_config
from tests import tiny
from tests.data.samples import bloom, first_alone, tokens
from tests.models.windowed import WindowedConfig, WindowedForCausalLM, WithOwnMask
from tests.trainer.runs import arguments
from unsloth_fast import UnslothTrainingArguments, backends
from unsloth_fast.data.facts import config_and_class, decide_batching, vocabulary_size
from unsloth_fast.models import place

GIVEN = {"processing_class": "a tokenizer"}
PREFIX = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
INVOKED = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5])
ADALORA = AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=9)
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def decide(folder: Path, kind: type = UnslothTrainingArguments, model: Any = None, **options: Any) -> Any:
    """The plan of a run; options that are not data or an adapter are arguments."""
    names = ("data_collator", "train_dataset", "peft_config", "processing_class")
    given = GIVEN | {name: options.pop(name) for name in names if name in options}
    return decide_batching(model or tiny.model(), arguments(folder, kind, **options), given)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (UnslothTrainingArguments, {}, (False, True)),
        (UnslothTrainingArguments, {"padding_free": False}, (False, False)),
        (UnslothTrainingArguments, {"packing": True}, (True, True)),
        (SFTConfig, {}, (False, False)),
        (SFTConfig, {"padding_free": True}, (False, True)),
        (SFTConfig, {"packing": True}, (True, True)),
    ],
)
def test_the_plan_follows_the_arguments(
    tmp_path: Path, kind: type, options: dict[str, Any], expected: tuple[bool, bool]
) -> None:
    """In a plain SFTConfig, padding_free=False counts as open where packing is on."""
    plan = decide(tmp_path, kind, **options)
    assert (plan.packing, plan.padding_free, plan.reasons) == (*expected, ())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data_collator": first_alone}, "a data collator was passed"),
        ({"train_dataset": tokens(3, image=["a"])}, "the data set has columns of images, video or audio"),
        ({"padding_free": False}, "padding_free=False was requested"),
        ({"peft_config": PREFIX}, "prompt learning puts positions before each row"),
        ({"model": lambda: get_peft_model(tiny.model(), PREFIX)}, "prompt learning puts positions before each row"),
        ({"peft_config": INVOKED}, "the adapter looks for its alora_invocation_tokens once in each row"),
        ({"model": lambda: get_peft_model(tiny.model(), INVOKED)}, "the adapter looks for its alora_invocation_tokens"),
        ({"peft_config": ADALORA}, "the adapter has a forward of its own (AdaLoraModel)"),
        ({"model": bloom}, "the model takes no position_ids"),
    ],
    ids=[
        "collator",
        "images",
        "padded",
        "prefix",
        "model with a prefix",
        "aLoRA",
        "model with aLoRA",
        "AdaLoRA",
        "bloom",
    ],
)
def test_each_obstacle_gives_its_reason(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    options = {name: value() if name == "model" else value for name, value in options.items()}
    plan = decide(tmp_path, packing=True, **options)
    assert (plan.packing, plan.padding_free) == (False, False)
    assert any(text.startswith(reason) for text in plan.reasons)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("implementation", "allowed"), [(None, True), ("eager", True), ("flex_attention", False)])
def test_a_mask_that_leaks_is_an_obstacle_where_ours_does_not_replace_it(
    tmp_path: Path, implementation: str | None, allowed: bool, named: bool
) -> None:
    """It is one for a model, and for the name of a model that the run's arguments load."""
    config = GptOssConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=16, num_local_experts=2, vocab_size=48)
    options = {"attn_implementation": implementation} if implementation else {}
    if named:
        config.architectures = ["GptOssForCausalLM"]
        config.save_pretrained(tmp_path / "model")
        plan = decide(tmp_path, model=str(tmp_path / "model"), model_init_kwargs=options)
    else:
        plan = decide(tmp_path, model=GptOssForCausalLM._from_config(config, **options))
    assert plan.padding_free == allowed


def test_masks_of_an_unknown_architecture_are_an_obstacle_unless_transformers_makes_them(tmp_path: Path) -> None:
    """This also holds once the operations are placed."""
    for model_class, allowed in ((WindowedForCausalLM, True), (WithOwnMask, False)):
        model = model_class(WindowedConfig())
        for _ in range(2):
            plan = decide(tmp_path, model=model)
            assert plan.padding_free == allowed
            assert allowed or plan.reasons[0].startswith("the model makes its masks without a look at documents")
            place(model, backends.resolve("reference"))


@pytest.mark.parametrize(("model_class", "allowed"), [(RobertaForCausalLM, False), (GPT2LMHeadModel, True)])
def test_masks_that_transformers_makes_without_positions_are_an_obstacle(
    tmp_path: Path, model_class: Any, allowed: bool
) -> None:
    """Documents of a row see each other, unless the masks know the positions that restart."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "is_decoder": True, "pad_token_id": 0}
    options = {"vocab_size": len(tiny.WORDS), "max_position_embeddings": 64, "intermediate_size": 32}
    model = model_class(model_class.config_class(**sizes, **options)).eval()
    plan = decide(tmp_path, model=model)
    assert plan.padding_free == allowed
    place(model, backends.resolve("reference"))
    batch = tiny.packed([5, 7])
    last = [model(**batch | {"input_ids": batch["input_ids"].index_fill(1, torch.tensor([2]), 9)}).logits[:, 5:]]
    assert torch.equal(model(**batch).logits[:, 5:], *last) == allowed


@pytest.mark.parametrize("lora", [False, True])
def test_an_adapter_is_no_obstacle(tmp_path: Path, lora: bool) -> None:
    model = get_peft_model(tiny.model(), LORA) if lora else tiny.model()
    plan = decide(tmp_path, model=model, **{} if lora else {"peft_config": LORA})
    assert plan.padding_free and not plan.reasons


def test_a_model_and_its_name_have_one_configuration_and_class(tmp_path: Path) -> None:
    """A name is resolved without loading the weights; an adapter is removed."""
    args, folder = arguments(tmp_path / "run"), tiny.folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    for model in (folder, tiny.model(), get_peft_model(tiny.model(), LORA)):
        config, model_class = config_and_class(model, args)
        assert config.model_type == "llama" and model_class is LlamaForCausalLM
    assert decide(tmp_path, model=folder).padding_free


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", None),
        ("llama4_text", "the model's attention counts the tokens of a row, not those of a document"),
        ("minimax_m3_vl_text", "the model makes its masks without a look at documents of a row, which may join them"),
        ("deepseek_v32", "the model makes its masks without a look at documents of a row, which may join them"),
    ],
)
def test_a_model_and_its_name_have_one_plan(tmp_path: Path, name: str, reason: str | None) -> None:
    """What only the code of a model shows is seen without its weights."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    model: Any = AutoModelForCausalLM.from_config(tiny_config(name))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "model")
    for each in (model, str(tmp_path / "model")):
        assert decide(tmp_path, model=each, packing=True).reasons == (() if reason is None else (reason,))


@pytest.mark.parametrize(
    ("given", "options", "expected"),
    [
        ({}, {}, len(tiny.WORDS)),
        ({}, {"chat_template_path": "a/template.jinja"}, len(tiny.WORDS)),
        ({}, {"chat_template_path": "another/model"}, None),
        ({"data_collator": first_alone}, {}, None),
    ],
    ids=["model", "template file", "template of a model", "collator"],
)
def test_the_vocabulary_is_the_models_unless_data_may_hold_other_tokens(
    tmp_path: Path, given: dict[str, Any], options: dict[str, Any], expected: int | None
) -> None:
    """A collator may change the tokens, and TRL adds the tokens of another model with its chat template."""
    assert vocabulary_size(tiny.model(), arguments(tmp_path, **options), given) == expected

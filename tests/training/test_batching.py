"""Batching plans and keyword migration: every combination of facts, every obstacle, every way of naming."""

import inspect
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

import unsloth_fast.training
import unsloth_ref.training
from unsloth_ref.types import BatchingPlan, ConfigFacts, ModelFacts

PACKAGES = [unsloth_ref.training, unsloth_fast.training]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
LLAMA = ModelFacts("llama")


def test_both_plan_alike_whatever_the_facts() -> None:
    """All 2 304 combinations, reasons and their order included; and what holds for every plan."""
    yes = (False, True)
    for model_facts in product(("llama", "gemma2", "gpt_oss"), yes, yes, yes):
        for config_facts in product(yes, (None, False, True), yes, yes, yes, yes):
            model, config = ModelFacts(*model_facts), ConfigFacts(*config_facts)
            plan = unsloth_ref.training.batching_plan(model, config)
            assert unsloth_fast.training.batching_plan(model, config) == plan
            assert not (plan.reasons and (plan.packing or plan.padding_free))
            assert plan.packing == (config.packing and not plan.reasons)
            assert plan.padding_free == (config.padding_free is not False and not plan.reasons)


@each_package
@pytest.mark.parametrize(
    ("packing", "padding_free", "expected"),
    [
        (False, None, BatchingPlan(packing=False, padding_free=True)),
        (False, True, BatchingPlan(packing=False, padding_free=True)),
        (False, False, BatchingPlan(packing=False, padding_free=False)),
        (True, None, BatchingPlan(packing=True, padding_free=True)),
        (True, True, BatchingPlan(packing=True, padding_free=True)),
    ],
)
def test_where_nothing_stands_in_the_way(
    package: ModuleType, packing: bool, padding_free: bool | None, expected: BatchingPlan
) -> None:
    """Packing as asked, padding-free unless refused; capped logits are no obstacle."""
    for model in (LLAMA, ModelFacts("gemma2")):
        assert package.batching_plan(model, ConfigFacts(packing=packing, padding_free=padding_free)) == expected


OBSTACLES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"custom_collator": True}, "a data collator was given"),
    ({}, {"processor": True}, "a processor, not a tokenizer"),
    ({"multimodal": True}, {"processing_class": False}, "takes more than tokens"),
    ({}, {"vision_columns": True}, "columns of images or video"),
    ({"encoder_decoder": True}, {}, "an encoder and a decoder"),
    ({"recurrent": True}, {}, "state would leak"),
    ({"model_type": "opt"}, {}, "see each other"),
    ({"model_type": "gpt_oss"}, {}, "see each other"),
    ({}, {"packing": True, "padding_free": False}, "padding_free=False was asked for"),
]


@each_package
@pytest.mark.parametrize(("model", "config", "reason"), OBSTACLES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("asked", [{}, {"packing": True}, {"padding_free": True}])
def test_each_obstacle_turns_both_off_and_says_so(
    package: ModuleType, model: dict[str, Any], config: dict[str, Any], reason: str, asked: dict[str, Any]
) -> None:
    """Whether anything was asked for or not."""
    plan = package.batching_plan(replace(LLAMA, **model), replace(ConfigFacts(), **{**asked, **config}))
    assert (plan.packing, plan.padding_free) == (False, False)
    assert len(plan.reasons) == 1 and reason in plan.reasons[0]


@each_package
def test_every_obstacle_is_said(package: ModuleType) -> None:
    """Whoever removes one knows of the others."""
    plan = package.batching_plan(
        replace(LLAMA, recurrent=True, encoder_decoder=True), ConfigFacts(custom_collator=True)
    )
    assert len(plan.reasons) == 3


@pytest.mark.parametrize(("kind", "leaks"), [("llama", False), ("opt", True), ("falcon", None)])
@each_package
def test_models_that_leak_are_known(package: ModuleType, kind: str, leaks: bool | None) -> None:
    """Another first document changes the logits of the second, although positions restart: such rows are refused.

    Falcon's have leaked until transformers 5.23, and are refused with every release.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    tokens, positions = torch.arange(3, 11)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    other = tokens.clone()
    other[0, :4] += 20
    with torch.no_grad():
        one, two = (
            model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 4:] for ids in (tokens, other)
        )
    assert leaks is None or torch.equal(one, two) != leaks
    assert bool(package.batching_plan(ModelFacts(kind), ConfigFacts()).reasons) == (leaks is not False)


TODAY = (["model", "args", "processing_class"], ["packing", "max_length", "dataset_text_field"])


@each_package
def test_old_names_move_to_where_they_belong_today(package: ModuleType) -> None:
    """The oldest call style in one call."""
    tokenizer = object()
    keywords = {"tokenizer": tokenizer, "max_seq_length": 512, "packing": True, "dataset_text_field": "text", "args": 1}
    trainer, config = package.migrate_keywords(*TODAY, keywords)
    assert trainer == {"processing_class": tokenizer, "args": 1}
    assert config == {"max_length": 512, "packing": True, "dataset_text_field": "text"}
    assert package.migrate_keywords(*TODAY, {**trainer, **config}) == (trainer, config)


@each_package
def test_a_name_that_is_still_known_is_kept(package: ModuleType) -> None:
    """An older trainer takes the tokenizer itself, an older config the old length."""
    found = package.migrate_keywords(["tokenizer"], ["max_seq_length"], {"tokenizer": 1, "max_seq_length": 2})
    assert found == ({"tokenizer": 1}, {"max_seq_length": 2})


@each_package
def test_the_same_value_under_both_names_is_no_conflict(package: ModuleType) -> None:
    """One object twice."""
    both = {"tokenizer": "t", "processing_class": "t"}
    assert package.migrate_keywords(*TODAY, both) == ({"processing_class": "t"}, {})


@each_package
@pytest.mark.parametrize(
    ("keywords", "error", "why"),
    [
        ({"max_lenght": 5}, TypeError, "^max_lenght: got an unknown keyword"),
        ({"tokenizer": 1, "processing_class": 2}, ValueError, "^tokenizer: got 1, and processing_class=2"),
        ({"max_length": 1, "max_seq_length": 2}, ValueError, "^max_seq_length: got 2, and max_length=1"),
    ],
)
def test_what_cannot_be_meant_is_named(
    package: ModuleType, keywords: dict[str, int], error: type[Exception], why: str
) -> None:
    """Nothing is dropped in silence."""
    with pytest.raises(error, match=why):
        package.migrate_keywords(*TODAY, keywords)


@each_package
def test_today_s_trl_takes_what_comes_out(package: ModuleType) -> None:
    """The names are those of the installed trainer and config."""
    parameters = inspect.signature(SFTTrainer).parameters
    fields = [name for name in SFTConfig.__dataclass_fields__ if name not in TrainingArguments.__dataclass_fields__]
    trainer, config = package.migrate_keywords(
        parameters, fields, {"tokenizer": 1, "max_seq_length": 2, "packing": True}
    )
    assert trainer == {"processing_class": 1}
    assert config == {"max_length": 2, "packing": True}

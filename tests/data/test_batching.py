"""Batching plans: every combination of facts, every obstacle, and the models whose documents see each other."""

from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unsloth_fast.data.batching import LEAKING_MODELS, BatchingPlan, ConfigFacts, ModelFacts, batching_plan

LLAMA = ModelFacts("llama")
VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "gpt_oss"),
    "attn_implementation": ("flex_attention",),
    "padding_free": (None, False, True),
    "recurrent_layers": ((),),
    "joined": (None,),
}


def combinations(facts: type[Any]) -> list[Any]:
    names = [field.name for field in fields(facts)]
    return [facts(*values) for values in product(*(VALUES.get(name, (False, True)) for name in names))]


def name_of(model: ModelFacts) -> str:
    true = [name for name, value in vars(model).items() if value is True]
    return " ".join([model.model_type, model.attn_implementation or "", *true])


# 256 models and 192 runs: 49 152 combinations.
each_model = pytest.mark.parametrize("model", combinations(ModelFacts), ids=name_of)
CONFIGS = combinations(ConfigFacts)


@each_model
def test_a_request_is_granted_or_a_reason_is_given(model: ModelFacts) -> None:
    for config in CONFIGS:
        plan = batching_plan(model, config)
        denied = (config.packing and not plan.packing) or (config.padding_free is True and not plan.padding_free)
        assert plan.reasons or not denied
        assert not plan.reasons or not (plan.packing or plan.padding_free)


@each_model
def test_padding_free_false_is_kept_and_nothing_is_packed_without_a_request(model: ModelFacts) -> None:
    for config in CONFIGS:
        plan = batching_plan(model, config)
        assert config.padding_free is not False or not plan.padding_free
        assert not plan.packing or (config.packing and plan.padding_free)


@each_model
def test_without_an_obstacle_the_plan_follows_the_request(model: ModelFacts) -> None:
    for config in CONFIGS:
        plan = batching_plan(model, config)
        assert plan.packing == (config.packing and not plan.reasons)
        assert plan.padding_free == (config.padding_free is not False and not plan.reasons)


@each_model
def test_the_reasons_do_not_depend_on_the_request(model: ModelFacts) -> None:
    """An obstacle is reported if packing is requested, if padding-free batches are, and if nothing is."""
    for config in CONFIGS:
        plan = batching_plan(model, config)
        without = batching_plan(model, replace(config, packing=False, padding_free=None))
        contradiction = config.packing and config.padding_free is False
        assert plan.reasons[: len(plan.reasons) - contradiction] == without.reasons


ALWAYS: list[dict[str, Any]] = [
    *({"model_type": model_type} for model_type in sorted(LEAKING_MODELS)),
    {"encoder_decoder": True},
    {"recurrent": True},
    {"custom_collator": True},
    {"takes_positions": False},
    {"positions_by_axis": True},
    {"unknown_masks": True},
    {"own_positions": True},
    {"joined": "seen to join"},
    {"adapter": "seen to read rows"},
]


@pytest.mark.parametrize("obstacle", ALWAYS, ids=str)
def test_one_more_obstacle_turns_both_off(obstacle: dict[str, Any]) -> None:
    """Packing and padding-free are off, whatever the other facts of the model and of the run are."""
    on_model = {name: value for name, value in obstacle.items() if name in vars(LLAMA)}
    on_run = {name: value for name, value in obstacle.items() if name not in vars(LLAMA)}
    for model, config in product(combinations(ModelFacts), CONFIGS):
        plan = batching_plan(replace(model, **on_model), replace(config, **on_run))
        assert plan.reasons and not plan.packing and not plan.padding_free


@pytest.mark.parametrize("model", [LLAMA, ModelFacts("gpt_oss")], ids=name_of)
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
def test_plans_without_an_obstacle(
    packing: bool, padding_free: bool | None, expected: BatchingPlan, model: ModelFacts
) -> None:
    """Packing is as requested, and padding-free batches are on by default; softcapped logits are not an obstacle."""
    assert batching_plan(model, ConfigFacts(packing=packing, padding_free=padding_free)) == expected


OBSTACLES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"custom_collator": True}, "a data collator was passed"),
    ({}, {"processor": True}, "a processor, not a tokenizer"),
    ({"multimodal": True}, {"processing_class": False}, "takes more than tokens"),
    ({}, {"media_columns": True}, "columns of images, video or audio"),
    ({"encoder_decoder": True}, {}, "an encoder-decoder"),
    ({"recurrent": True}, {}, "state would leak"),
    ({"recurrent": True, "recurrent_layers": ("JambaMambaMixer",)}, {}, "recurrent layers (JambaMambaMixer), whose"),
    ({"model_type": "opt"}, {}, "see each other"),
    ({"model_type": "gpt_oss", "attn_implementation": "flex_attention"}, {}, "see each other"),
    ({"takes_positions": False}, {}, "takes no position_ids"),
    ({"positions_by_axis": True}, {}, "positions have several axes"),
    ({"unknown_masks": True}, {}, "may join them"),
    ({"own_positions": True}, {}, "counts the tokens of a row, not those of a document"),
    ({"joined": "seen to join"}, {}, "seen to join"),
    ({}, {"adapter": "seen to read rows"}, "seen to read rows"),
    ({}, {"packing": True, "padding_free": False}, "padding_free=False was requested"),
]


@pytest.mark.parametrize(("model", "config", "reason"), OBSTACLES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("request_", [{}, {"packing": True}, {"padding_free": True}], ids=str)
def test_each_obstacle_turns_both_off_with_its_reason(
    model: dict[str, Any], config: dict[str, Any], reason: str, request_: dict[str, Any]
) -> None:
    plan = batching_plan(replace(LLAMA, **model), replace(ConfigFacts(), **{**request_, **config}))
    assert (plan.packing, plan.padding_free) == (False, False)
    assert len(plan.reasons) == 1 and reason in plan.reasons[0]


def test_all_obstacles_are_reported() -> None:
    """A user who removes one obstacle knows the others."""
    plan = batching_plan(replace(LLAMA, recurrent=True, encoder_decoder=True), ConfigFacts(custom_collator=True))
    assert len(plan.reasons) == 3


@pytest.mark.parametrize(("model_type", "leaks"), [("llama", False), ("opt", True), ("falcon", None)])
def test_leaking_models_are_refused(model_type: str, leaks: bool | None) -> None:
    """If another first document changes the logits of the second, although position_ids restart, packing is refused.

    Falcon leaked until transformers 5.23, and is refused with every release.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    tokens, positions = torch.arange(3, 11)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    other = tokens.clone()
    other[0, :4] += 20
    with torch.no_grad():
        one, two = (
            model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 4:] for ids in (tokens, other)
        )
    assert leaks is None or torch.equal(one, two) != leaks
    assert bool(batching_plan(ModelFacts(model_type), ConfigFacts()).reasons) == (leaks is not False)

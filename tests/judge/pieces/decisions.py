"""Batching plans, keywords and indices, wrong and right."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.judge.pieces import Collected
from unsloth_ref import batch_checks, training
from unsloth_ref.types import BatchingPlan, ConfigFacts, ModelFacts, PackingPlan

collected = Collected()


@collected.fails("batching_plan", "refusals_kept")
def refusal_overturned(model: ModelFacts, config: ConfigFacts) -> BatchingPlan:
    """Padding-free for everybody."""
    return training.batching_plan(model, replace(config, padding_free=None))


@collected.fails("batching_plan", "refusals_said")
def refused_in_silence(model: ModelFacts, config: ConfigFacts) -> BatchingPlan:
    """Off, and nobody knows why."""
    return replace(training.batching_plan(model, config), reasons=())


@collected.fails("batching_plan", "refusals_said")
def said_only_of_packing(model: ModelFacts, config: ConfigFacts) -> BatchingPlan:
    """A refused padding_free=True is silent."""
    plan = training.batching_plan(model, config)
    return plan if config.packing else replace(plan, reasons=())


@collected.fails("batching_plan", "monotone")
def recurrent_models_packed(model: ModelFacts, config: ConfigFacts) -> BatchingPlan:
    """State leaks from document to document."""
    return training.batching_plan(replace(model, recurrent=False), config)


@collected.fails("batching_plan", "equal")
def padded_by_default(model: ModelFacts, config: ConfigFacts) -> BatchingPlan:
    """Padding-free only where it was asked for."""
    return training.batching_plan(model, replace(config, padding_free=bool(config.padding_free or config.packing)))


@collected.fails("batching_plan", "equal")
def gemma2_refused(model: ModelFacts, config: ConfigFacts) -> BatchingPlan:
    """Capped logits taken for an obstacle."""
    if model.model_type == "gemma2":
        return BatchingPlan(packing=False, padding_free=False, reasons=("gemma2",))
    return training.batching_plan(model, config)


def _sorted(trainer: Collection[str], config: Collection[str], keywords: Mapping[str, Any]) -> Any:
    """By membership alone."""
    return (
        {name: value for name, value in keywords.items() if name in trainer},
        {name: value for name, value in keywords.items() if name in config and name not in trainer},
    )


@collected.passes("migrate_keywords")
def renamed_first(trainer_parameters: Any, config_fields: Any, keywords: Mapping[str, Any]) -> Any:
    """Renames, then sorts."""
    known = {*trainer_parameters, *config_fields}
    training.migrate_keywords(trainer_parameters, config_fields, keywords)
    new = {"tokenizer": "processing_class", "max_seq_length": "max_length"}
    renamed = {name if name in known else new[name]: value for name, value in keywords.items()}
    return _sorted(trainer_parameters, config_fields, renamed)


@collected.fails("migrate_keywords", "error_parity", "nothing_lost")
def unknown_dropped(trainer_parameters: Any, config_fields: Any, keywords: Mapping[str, Any]) -> Any:
    """A misspelt keyword does nothing, silently."""
    return _sorted(trainer_parameters, config_fields, keywords)


@collected.fails("migrate_keywords", "equal")
def new_name_wins(trainer_parameters: Any, config_fields: Any, keywords: Mapping[str, Any]) -> Any:
    """Of two values one is dropped."""
    known = {*trainer_parameters, *config_fields}
    old = {"tokenizer": "processing_class", "max_seq_length": "max_length"}
    kept = {n: v for n, v in keywords.items() if n in known or old.get(n) not in keywords}
    return training.migrate_keywords(trainer_parameters, config_fields, kept)


@collected.fails("migrate_keywords", "equal", "nothing_lost")
def always_renamed(trainer_parameters: Any, config_fields: Any, keywords: Mapping[str, Any]) -> Any:
    """A trainer that still has the old name is given the new one."""
    new = {"tokenizer": "processing_class", "max_seq_length": "max_length"}
    renamed = {new.get(name, name): value for name, value in keywords.items()}
    return training.migrate_keywords({*trainer_parameters, *new.values()}, config_fields, renamed)


@collected.fails("migrate_keywords", "inputs_untouched")
def popped(trainer_parameters: Any, config_fields: Any, keywords: Any) -> Any:
    """Empties what it was given."""
    found = training.migrate_keywords(trainer_parameters, config_fields, keywords)
    keywords.clear()
    return found


@collected.passes("packed_indices")
def span_by_span(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """A range a span."""
    batch_checks.plan_fits(plan, offsets)
    spans = zip((offsets.long()[plan.documents] + plan.starts).tolist(), plan.lengths.tolist(), strict=True)
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(s, s + n) for s, n in spans)])


@collected.fails("packed_indices", "rows_of_documents")
def starts_forgotten(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """Every span begins where its document does."""
    return training.packed_indices(replace(plan, starts=torch.zeros_like(plan.starts)), offsets)


@collected.fails("packed_indices", "rows_of_documents")
def in_the_order_of_the_data(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """The right tokens in the wrong places."""
    return training.packed_indices(plan, offsets).sort().values


@collected.fails("packed_indices", "error_parity")
def shortened(plan: PackingPlan, offsets: Tensor) -> Tensor:
    """A document that lacks tokens is read on into the next one."""
    spans = zip((offsets.flatten()[plan.documents] + plan.starts).tolist(), plan.lengths.tolist(), strict=True)
    return torch.tensor([first + token for first, length in spans for token in range(length)], dtype=torch.int64)

"""The facts of a model and a run that decide about batching: read from the model's configuration and class alone."""

import copy
import inspect
import logging
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch.nn import Module
from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin
from trl import SFTConfig

from unsloth_fast.config import UnslothTrainingArguments
from unsloth_fast.data.batching import BatchingPlan, ConfigFacts, ModelFacts, batching_plan, own_masks
from unsloth_fast.data.columns import datasets_of, has_media_columns
from unsloth_fast.data.tokens import has_packed_rows, refuse_packed_rows
from unsloth_fast.data.types import Keywords
from unsloth_fast.failures import FAILURES
from unsloth_fast.models.apart import joined_documents
from unsloth_fast.models.documents import carriers_of, counts_tokens, finds_documents
from unsloth_fast.models.head import without_adapter
from unsloth_fast.models.interface import ATTENTION_LAYERS, stacks_of
from unsloth_fast.models.packed import implementation_of, is_foreign
from unsloth_fast.models.positions import depends_on_batch
from unsloth_fast.models.tuners import obstacle_to_packing

logger = logging.getLogger(__name__)

_OTHER_INPUTS = ("vision_config", "audio_config", "img_processor", "image_token_index", "projector_config")
_STEPS = ("compute_loss", "training_step", "prediction_step")  # methods of the trainer that receive a batch
_RECURRENT = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_sliding")


def decide_batching(model: Module | str, args: SFTConfig, given: Keywords, *, kind: type | None = None) -> BatchingPlan:
    """Whether a run packs, whether its batches are padding-free, and what speaks against either.

    Args:
        model: the model, or the name or path of one.
        args: the run's arguments.
        given: the trainer's other keywords.
        kind: the trainer's class, which may be derived from `UnslothTrainer`; None for that itself.

    Raises:
        ValueError: rows that were packed earlier, and batches that are padded.
    """
    config, model_class = config_and_class(model, args)
    options: Any = args.model_init_kwargs or {}
    facts = _model_facts(config, model_class, options.get("attn_implementation") if isinstance(model, str) else None)
    built = _empty(config, model_class, facts.attn_implementation) if isinstance(model, str) else model
    if facts.recurrent:
        facts = _with_mixers(facts, built)
    if built is not None:
        unknown = facts.unknown_masks or _makes_unknown_masks(built)
        by_axis = facts.positions_by_axis and not _bounds_reach(built, attentions=True)
        counted = counts_tokens(built)
        facts = replace(facts, unknown_masks=unknown, own_positions=counted, positions_by_axis=by_axis)
    run = _config_facts(model, args, given, kind)
    plan = batching_plan(facts, run)
    if plan.padding_free and not isinstance(model, str):
        plan = batching_plan(replace(facts, joined=joined_documents(without_adapter(model))), run)
    if not plan.padding_free and given.get("data_collator") is None:
        for name, dataset in datasets_of(given):
            refuse_packed_rows(dataset, name, "; ".join(plan.reasons) or "padding_free=False was requested")
    if plan.padding_free and depends_on_batch(config):
        logger.info(
            "positions: the frequencies of this model's RoPE depend on the longest document of a batch, as in "
            "transformers with padding"
        )
    return plan


def takes_images(model: Module | str, args: SFTConfig, given: Keywords) -> bool:
    """Whether a processor was passed, or will be loaded for a model that takes more than tokens.

    Args:
        model: the model, or the name or path of one.
        args: the run's arguments.
        given: the trainer's other keywords.
    """
    processing_class = given.get("processing_class")
    if processing_class is not None:
        return isinstance(processing_class, ProcessorMixin)
    return _model_facts(*config_and_class(model, args)).multimodal


def vocabulary_size(model: Module | str, args: SFTConfig, given: Keywords) -> int | None:
    """How many tokens the model has; None where data may hold others: for a collator, or tokens that TRL adds.

    Args:
        model: the model, or the name or path of one.
        args: the run's arguments.
        given: the trainer's other keywords.
    """
    template = args.chat_template_path  # of another model, whose tokens are added, or a file
    if given.get("data_collator") is not None or (template and not template.endswith((".jinja", ".j2"))):
        return None
    return getattr(config_and_class(model, args)[0].get_text_config(), "vocab_size", None)


def config_and_class(model: Module | str, args: SFTConfig) -> tuple[PreTrainedConfig, type]:
    """The configuration and the class of a model, or of the name or path of one."""
    if not isinstance(model, str):
        inner = without_adapter(model)
        return inner.config, type(inner)
    options: Any = args.model_init_kwargs or {}
    revision = options.get("revision") or "main"
    trusted = getattr(args, "trust_remote_code", options.get("trust_remote_code", False))  # TRL's field since 1.6
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusted)
    return config, getattr(transformers, (config.architectures or [""])[0], object)  # the class that TRL loads


def _model_facts(config: PreTrainedConfig, model_class: type, implementation: str | None = None) -> ModelFacts:
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    forward = getattr(model_class, "forward", None)
    recurrent = bool(getattr(model_class, "_is_stateful", False)) or not {*_RECURRENT}.isdisjoint(layers)
    return ModelFacts(
        model_type=config.model_type,
        attn_implementation=implementation or implementation_of(config),
        encoder_decoder=bool(config.is_encoder_decoder),
        multimodal=any(hasattr(config, name) for name in _OTHER_INPUTS),
        recurrent=recurrent,
        unknown_masks=not recurrent and not ATTENTION_LAYERS.issuperset(layers),
        takes_positions=forward is not None and "position_ids" in inspect.signature(forward).parameters,
        positions_by_axis="mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {}),
    )


def _empty(config: PreTrainedConfig, model_class: Any, implementation: str | None) -> Module | None:
    """The model without memory for its weights; None if the class makes none."""
    if not hasattr(model_class, "_from_config"):
        return None
    try:
        with torch.device("meta"):
            built = model_class._from_config(copy.deepcopy(config))
    except FAILURES:  # loading it says why
        return None
    for stack in stacks_of(built) if implementation else ():  # set here, as its package may not be installed
        stack.config._attn_implementation = implementation
    return built


def _with_mixers(facts: ModelFacts, model: Module | None) -> ModelFacts:
    """The facts of a model with recurrent layers: what is placed may keep their state within documents."""
    if model is not None and _bounds_reach(model):
        return replace(facts, recurrent=False, positions_by_axis=False)
    return replace(facts, recurrent_layers=() if model is None else tuple(carriers_of(model)))


def _bounds_reach(model: Module, *, attentions: bool = False) -> bool:
    """Whether the bounds of documents reach each layer, so that nothing looks for them in the positions.

    Under flex attention they reach layers that carry a state, but not the attentions.
    """
    stacks = list(stacks_of(model))
    by_bounds = (not is_foreign(stack) and own_masks(implementation_of(stack.config)) for stack in stacks)
    return bool(stacks) and (all(by_bounds) if attentions else not any(map(is_foreign, stacks)))


def _makes_unknown_masks(model: Module) -> bool:
    """Whether a stack of layers makes masks by its own means, or without position_ids in a model of transformers."""
    return any(
        is_foreign(stack) and not (type(stack).__module__.startswith("transformers.") and finds_documents(stack))
        for stack in stacks_of(model)
    )


def _config_facts(model: Module | str, args: SFTConfig, given: Keywords, kind: type | None) -> ConfigFacts:
    padding_free, plain = args.padding_free, not isinstance(args, UnslothTrainingArguments)
    # A plain trl.SFTConfig cannot leave padding_free open: with packing its False counts as open. A loss of the user's
    # own may read what padded batches have, such as an attention_mask, or a row per document.
    own_steps = None if plain or padding_free is not None else _own_steps(given, kind)
    if not padding_free and (plain or own_steps is not None):
        packed = args.packing or any(has_packed_rows(dataset) for _, dataset in datasets_of(given))
        padding_free = None if packed else False
        if own_steps is not None and not packed and given.get("data_collator") is None:
            logger.warning("batching: padded, because %s; padding_free=True concatenates the documents", own_steps)
    processor = given.get("processing_class")
    adapter = given.get("peft_config") or getattr(model, "active_peft_config", None)
    return ConfigFacts(
        packing=args.packing,
        padding_free=padding_free,
        custom_collator=given.get("data_collator") is not None,
        processor=isinstance(processor, ProcessorMixin),
        processing_class=processor is not None,
        media_columns=has_media_columns(given),
        adapter=obstacle_to_packing(adapter),
    )


def _own_steps(given: Keywords, kind: type | None) -> str | None:
    """Which code of the user's own takes batches to the model or the loss, as a reason; None if there is none.

    A method that calls one of these methods itself, such as `super().compute_loss`, leaves that to the trainer.

    Args:
        given: the trainer's keywords.
        kind: the trainer's class; None for `UnslothTrainer`.
    """
    if given.get("compute_loss_func") is not None:
        return "compute_loss_func is your own"
    for name in _STEPS:
        for base in () if kind is None else inspect.getmro(kind):
            method = vars(base).get(name)
            if hasattr(method, "overrides"):  # the trainer's own, see seams.py
                break
            if method is not None and not _calls(method, _STEPS):
                return f"{base.__name__}.{name} is your own"
    return None


def _calls(method: Any, names: tuple[str, ...]) -> bool:
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is not None and not set(names).isdisjoint(code.co_names)

"""Batching: whether rows are packed and batches go without padding, and where old keywords belong, by table."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from unsloth_ref.types import BatchingPlan, ConfigFacts, ModelFacts

# Keywords that TRL once took, and what they are called now.
_RENAMED = {"tokenizer": "processing_class", "max_seq_length": "max_length"}

# Models whose attention in transformers 5.23 sees the documents of a row as one, restarting position_ids or not.
_LEAKING = frozenset(("biogpt", "bloom", "falcon", "gpt_oss", "mpt", "openai-gpt", "opt", "xglm", "xlm"))

# What stands in the way of rows of several documents, and when.
_OBSTACLES: tuple[tuple[str, Callable[[ModelFacts, ConfigFacts], bool]], ...] = (
    ("a data collator was given, which makes the batches itself", lambda model, config: config.custom_collator),
    (
        "the processing class is a processor, not a tokenizer",
        lambda model, config: config.processor and not config.custom_collator,
    ),
    (
        "the model takes more than tokens, and its processor is loaded by itself",
        lambda model, config: model.multimodal and not config.processing_class,
    ),
    (
        "the data have columns of images or video",
        lambda model, config: config.vision_columns and not config.custom_collator and not config.processor,
    ),
    ("the model is an encoder and a decoder", lambda model, config: model.encoder_decoder),
    (
        "the model has recurrent layers, whose state would leak from one document into the next",
        lambda model, config: model.recurrent,
    ),
    (
        "the model's attention lets the documents of a row see each other",
        lambda model, config: model.model_type in _LEAKING,
    ),
    (
        "padding_free=False was asked for, and packed rows are padding-free",
        lambda model, config: config.packing and config.padding_free is False,
    ),
)


def batching_plan(model: ModelFacts, config: ConfigFacts) -> BatchingPlan:
    """Whether to pack, whether to go without padding, and what stands in the way.

    Both change nothing but speed where a model keeps the documents of a row apart. Where something stands in the way
    both are off and every reason is given, whether they were asked for or not. Otherwise packing is as asked for, and
    padding-free is on, with or without packing, unless it was refused.

    Args:
        model: facts of the model.
        config: facts of the run.

    Returns:
        The plan.
    """
    reasons = tuple(reason for reason, stands in _OBSTACLES if stands(model, config))
    free = not reasons
    return BatchingPlan(free and config.packing, free and config.padding_free is not False, reasons)


def migrate_keywords(
    trainer_parameters: Collection[str], config_fields: Collection[str], keywords: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort keywords of any age into those of the trainer and those of its config, under today's names.

    A name that the trainer or the config knows keeps it: `tokenizer` becomes `processing_class`, and `max_seq_length`
    `max_length`, where only the new name is known.

    Args:
        trainer_parameters: names that the trainer takes.
        config_fields: names that the config has.
        keywords: as they were given to the trainer.

    Returns:
        The trainer's keywords, and the config's fields to set; together as many as were given, but for those given
        under both names.

    Raises:
        TypeError: a keyword that neither knows.
        ValueError: a keyword under both names with different values.
    """
    known = {*trainer_parameters, *config_fields}
    named: dict[str, Any] = {}
    for given, value in keywords.items():
        name = given if given in known else _RENAMED.get(given, given)
        if name not in known:
            raise TypeError(
                f"{given}: got an unknown keyword; allowed: those of the trainer and the fields of its config"
            )
        if name in named and named[name] is not value and named[name] != value:
            old = next(key for key, new in _RENAMED.items() if new == name)
            raise ValueError(f"{old}: got {keywords[old]!r}, and {name}={keywords[name]!r}; allowed: one of the two")
        named[name] = value
    trainer = {name: value for name, value in named.items() if name in trainer_parameters}
    return trainer, {name: value for name, value in named.items() if name not in trainer}

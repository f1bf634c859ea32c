"""Batching: whether rows are packed and batches go without padding, and where old keywords belong. Pure functions."""

from collections.abc import Collection, Mapping
from typing import Any

from unsloth_ref.types import BatchingPlan, ConfigFacts, ModelFacts

# Keywords that TRL once took, and what they are called now.
RENAMED = {"tokenizer": "processing_class", "max_seq_length": "max_length"}

# Models whose attention in transformers 5.23 sees the documents of a row as one, restarting position_ids or not: the
# logits of a document were seen to change with the tokens of the one before it.
LEAKING = ("biogpt", "bloom", "falcon", "gpt_oss", "mpt", "openai-gpt", "opt", "xglm", "xlm")


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
    reasons = []
    if config.custom_collator:
        reasons.append("a data collator was given, which makes the batches itself")
    if config.processor and not config.custom_collator:
        reasons.append("the processing class is a processor, not a tokenizer")
    if model.multimodal and not config.processing_class:
        reasons.append("the model takes more than tokens, and its processor is loaded by itself")
    if config.vision_columns and not config.custom_collator and not config.processor:
        reasons.append("the data have columns of images or video")
    if model.encoder_decoder:
        reasons.append("the model is an encoder and a decoder")
    if model.recurrent:
        reasons.append("the model has recurrent layers, whose state would leak from one document into the next")
    if model.model_type in LEAKING:
        reasons.append("the model's attention lets the documents of a row see each other")
    if config.packing and config.padding_free is False:
        reasons.append("padding_free=False was asked for, and packed rows are padding-free")
    if reasons:
        return BatchingPlan(packing=False, padding_free=False, reasons=tuple(reasons))
    return BatchingPlan(packing=config.packing, padding_free=config.padding_free is not False)


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
    trainer: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for given, value in keywords.items():
        name = given
        if given not in trainer_parameters and given not in config_fields:
            name = RENAMED.get(given, given)
        if name in trainer_parameters:
            found = trainer
        elif name in config_fields:
            found = config
        else:
            raise TypeError(
                f"{given}: got an unknown keyword; allowed: those of the trainer and the fields of its config"
            )
        if name in found and found[name] is not value and found[name] != value:
            old = next(key for key, new in RENAMED.items() if new == name)
            raise ValueError(f"{old}: got {keywords[old]!r}, and {name}={keywords[name]!r}; allowed: one of the two")
        found[name] = value
    return trainer, config

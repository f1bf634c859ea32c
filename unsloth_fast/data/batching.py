"""Whether a run packs its documents, and whether its batches go without padding: a pure function of a few facts."""

from dataclasses import dataclass

# Models whose attention in transformers 5.23 lets documents of a row see each other even if position_ids restart: the
# logits of a document were seen to change with the tokens of the document before it.
LEAKING_MODELS = frozenset(("biogpt", "bloom", "falcon", "mpt", "openai-gpt", "opt", "xglm", "xlm"))
# Those of which it is only the mask: ours keeps documents apart, and so does flash attention, by their lengths.
LEAKING_MASKS = frozenset(("afmoe", "gpt_oss"))


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that decide about batching.

    Attributes:
        model_type: as in the model's config, such as "llama".
        attn_implementation: as in the model's config; None for the default.
        encoder_decoder: whether the prompt is read by an encoder.
        multimodal: whether the model takes images, video or audio in addition to tokens.
        recurrent: whether a layer carries a state or a convolution from token to token (Mamba) that nothing placed
            keeps within documents, so that it would leak from one into the next.
        recurrent_layers: the classes of these layers, as far as they are known.
        takes_positions: whether the forward takes position_ids. transformers finds the documents of a row by them;
            without them each document would see those before it.
        unknown_masks: whether the model makes its masks by its own means, such as sparse attention, or by
            transformers' without position_ids, which may let documents see each other.
        own_positions: whether an attention counts the tokens of a row itself, on through its documents, as Llama 4 does
            for a factor of its queries.
        positions_by_axis: whether documents are found by positions that have several axes (multimodal RoPE), which
            transformers does not look at.
        joined: what a run of a few tokens showed to join documents, in words; None if nothing was seen.
    """

    model_type: str = ""
    attn_implementation: str | None = None
    encoder_decoder: bool = False
    multimodal: bool = False
    recurrent: bool = False
    recurrent_layers: tuple[str, ...] = ()
    takes_positions: bool = True
    positions_by_axis: bool = False
    unknown_masks: bool = False
    own_positions: bool = False
    joined: str | None = None


@dataclass(frozen=True)
class ConfigFacts:
    """The facts of a run that decide about batching.

    Attributes:
        packing: whether packing is requested.
        padding_free: whether batches without padding are requested; None if the user has not chosen.
        custom_collator: whether the user passed a data collator.
        processor: whether the processing class is a processor, not a tokenizer.
        processing_class: whether the user passed a processing class.
        media_columns: whether the data set has columns of images, video or audio.
        adapter: why the documents of a row may not be kept apart under the adapter, in words; None if they are.
    """

    packing: bool = False
    padding_free: bool | None = None
    custom_collator: bool = False
    processor: bool = False
    processing_class: bool = True
    media_columns: bool = False
    adapter: str | None = None


@dataclass(frozen=True)
class BatchingPlan:
    """How documents become batches.

    Attributes:
        packing: whether documents are packed into rows of up to the maximum length.
        padding_free: whether a batch is one row without padding; always true with packing.
        reasons: why packing and padding-free batches are impossible, both being off then; empty if they are possible.
    """

    packing: bool
    padding_free: bool
    reasons: tuple[str, ...] = ()


def batching_plan(model: ModelFacts, config: ConfigFacts) -> BatchingPlan:
    """Decide whether to pack and whether to go without padding, and give the reasons if neither is possible.

    If the model keeps the documents of a row apart, both change nothing but speed. Any obstacle turns both off; all
    obstacles are reported, whether or not packing or padding_free was requested. Without an obstacle, packing is as
    requested, and padding-free batches are on, with or without packing, unless padding_free is False.

    Args:
        model: facts of the model.
        config: facts of the run.

    Returns:
        The plan.
    """
    obstacles = (
        (config.custom_collator, "a data collator was passed, which builds the batches itself"),
        (config.processor and not config.custom_collator, "the processing class is a processor, not a tokenizer"),
        (
            model.multimodal and not config.processing_class,
            "the model takes more than tokens, and its own processor will be loaded",
        ),
        (
            config.media_columns and not config.custom_collator and not config.processor,
            "the data set has columns of images, video or audio",
        ),
        (model.encoder_decoder, "the model is an encoder-decoder"),
        (model.recurrent, f"the model has {_recurrent(model)}, whose state would leak from one document into the next"),
        (leaks(model), "the model's attention lets the documents of a row see each other"),
        (model.unknown_masks, "the model makes its masks without a look at documents of a row, which may join them"),
        (model.own_positions, "the model's attention counts the tokens of a row, not those of a document"),
        (not model.takes_positions, "the model takes no position_ids, by which documents of a row are kept apart"),
        (model.positions_by_axis, "the model's positions have several axes, by which documents are not kept apart"),
        (model.joined is not None, str(model.joined)),
        (config.adapter is not None, str(config.adapter)),
        (
            config.packing and config.padding_free is False,
            "padding_free=False was requested, and packed rows are padding-free",
        ),
    )
    reasons = tuple(reason for present, reason in obstacles if present)
    possible = not reasons
    return BatchingPlan(possible and config.packing, possible and config.padding_free is not False, reasons)


def _recurrent(model: ModelFacts) -> str:
    return f"recurrent layers ({', '.join(model.recurrent_layers)})" if model.recurrent_layers else "recurrent layers"


def leaks(model: ModelFacts) -> bool:
    """Whether the documents of a row see each other, whatever is placed under the model."""
    by_mask = model.model_type in LEAKING_MASKS and not own_masks(model.attn_implementation)
    return model.model_type in LEAKING_MODELS or by_mask


def own_masks(implementation: str | None) -> bool:
    """Whether an attn_implementation keeps documents apart by their bounds, by our masks or as flash attention."""
    return implementation in (None, "sdpa", "eager") or "flash" in implementation

"""How many positions a model has, and RoPE scaled for texts beyond them."""

import logging
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from unsloth_fast.models.kinds import whole

logger = logging.getLogger(__name__)

_NO_LENGTH = 10**9  # a tokenizer without a length has a larger number
_BY_LENGTH = ("dynamic", "longrope")  # kinds of RoPE scaling whose frequencies depend on the length of the batch


def position_limit(config: PreTrainedConfig) -> int | None:
    """The number of positions that a model has; None for no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def set_length(model: PreTrainedModel, length: int | None) -> None:
    """Make `length` the model's `max_seq_length`; None to leave it.

    Raises:
        ValueError: a length below 1 or beyond the model's positions.
    """
    if length is None:
        return
    whole("max_seq_length", length, 1)
    limit = position_limit(model.config)
    if limit is not None and length > limit:
        raise ValueError(
            f"max_seq_length: got {length}; allowed: 1 to {limit}, the model's max_position_embeddings. For longer "
            "texts pass max_seq_length to from_pretrained, which scales RoPE"
        )
    marked: Any = model
    marked.max_seq_length, marked.unsloth_length_asked = length, True


def scale_positions(config: PreTrainedConfig, length: int | None) -> None:
    """Make room for `length` positions: RoPE is scaled linearly by length / max_position_embeddings, which is logged.

    It is transformers' own scaling, written to the configuration, which changes in place. Where the kinds of layers
    have a RoPE each, that of layers with a sliding window stays as it is: no distance in them is longer than before.

    Args:
        config: the model's configuration.
        length: the maximum number of tokens per text; None for the model's.

    Raises:
        ValueError: a length below 1, or one beyond the positions of a model whose positions are learned, or scaled
            already.
    """
    limit = position_limit(config)
    if length is not None:
        whole("max_seq_length", length, 1)
    if length is None or limit is None or length <= limit:
        return
    text: Any = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    by_layer = given and all(isinstance(value, dict) for value in given.values())
    scaled = (
        {name: dict(value) for name, value in given.items() if isinstance(value, dict)} if by_layer else {"": given}
    )
    wide = {name: value for name, value in scaled.items() if name != "sliding_attention"}
    kinds = sorted({value.get("rope_type", "default") for value in wide.values() if value})
    if kinds != ["default"]:
        why = f"whose RoPE is scaled already ({', '.join(kinds)})" if kinds else "which has no RoPE to scale"
        raise ValueError(f"max_seq_length: got {length}; allowed: 1 to {limit} for this model, {why}")
    factor = length / limit
    scaled |= {name: {**value, "rope_type": "linear", "factor": factor} for name, value in wide.items()}
    text.rope_parameters = scaled if by_layer else scaled[""]
    text.max_position_embeddings = length
    logger.warning(
        "max_seq_length: %d is beyond the model's %d positions: RoPE is scaled linearly by %.4g; pass the same "
        "max_seq_length when you load an adapter of this model",
        length,
        limit,
        factor,
    )


def warn_of_longer_texts(tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
    """Warn of an adapter whose tokenizer has a length beyond the model's positions: its model may have been scaled."""
    length = tokenizer.model_max_length
    if limit is not None and limit < length < _NO_LENGTH:
        logger.warning(
            "max_seq_length: the adapter's texts had up to %d tokens, and the model has %d positions; if it was "
            "trained with max_seq_length=%d, pass that here, too",
            length,
            limit,
            length,
        )


def depends_on_batch(config: PreTrainedConfig) -> bool:
    """Whether the frequencies of a model's RoPE depend on the longest position of the batch."""
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    entries = [given, *(value for value in given.values() if isinstance(value, dict))]
    return any(entry.get("rope_type") in _BY_LENGTH for entry in entries)

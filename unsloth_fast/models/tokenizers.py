"""The tokenizer of a model: its template, its padding, and the embeddings that it needs."""

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from unsloth_fast.models import kinds
from unsloth_fast.models.protocols import CausalLM
from unsloth_fast.models.source import Source

logger = logging.getLogger(__name__)

_PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
)


def find_template(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Give a tokenizer without a chat template that of its processor, if there is a file with one."""
    if tokenizer.chat_template is None:
        options = {"_raise_exceptions_for_missing_entries": False, **source.adapter_hub}
        path = cached_file(source.find_tokenizer(), "chat_template.json", **options)
        if path is not None:
            tokenizer.chat_template = json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, model: CausalLM, max_seq_length: int | None) -> None:
    """Set the length, padding on the right, and a pad token: if possible not the one that ends a text."""
    tokenizer.padding_side = "right"
    if max_seq_length is not None:
        tokenizer.model_max_length = max_seq_length
    if tokenizer.pad_token is None:
        pad: Any = _unused_token(tokenizer, model) or tokenizer.eos_token
        tokenizer.add_special_tokens({"pad_token": pad})
        logger.warning("tokenizer: it has no pad token; using %r", tokenizer.pad_token)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _unused_token(tokenizer: Any, model: Any) -> str | None:
    """A token that no text contains: one of the vocabulary, or a new one if the embedding has a row for it."""
    vocabulary = tokenizer.get_vocab()
    for token in (*_PAD_TOKENS, tokenizer.unk_token):
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    return "<pad>" if len(tokenizer) < model.get_input_embeddings().num_embeddings else None


def resize_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, asked: int | None = None
) -> None:
    """Give a model the number of token embeddings that was asked for, or that its adapter was trained with.

    The adapter's weights show the number. Where they do not, the model gets a row for each token of the adapter's
    tokenizer, and no fewer than it has.

    Args:
        model: the model, without the adapter.
        tokenizer: of the adapter if it has one.
        source: where both come from.
        asked: the number to resize to; None for the adapter's.

    Raises:
        ValueError: fewer than 1.
    """
    rows: Any = model.get_input_embeddings().num_embeddings
    if asked is not None:
        kinds.whole("resize_model_vocab", asked, 1)
        if asked < len(tokenizer):
            logger.warning("resize_model_vocab: got %d, fewer than the tokenizer's %d tokens", asked, len(tokenizer))
    elif source.is_adapter:
        asked = _rows_of_adapter(model, source)
        if asked is None and source.find_tokenizer() == source.name:
            asked = max(rows, len(tokenizer))
    if asked not in (None, rows):
        logger.info("the model's %d token embeddings become %d", rows, asked)
        model.resize_token_embeddings(asked)


def grow_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Give a model a row for each token, and no fewer than it has."""
    rows: Any = model.get_input_embeddings().num_embeddings
    if tokens > rows:
        logger.info("the model's %d token embeddings become %d", rows, tokens)
        model.resize_token_embeddings(tokens)


def _rows_of_adapter(model: Any, source: Source) -> int | None:
    """How many tokens the embedding or the head has for which an adapter holds weights; None if it holds none."""
    options = {"_raise_exceptions_for_missing_entries": False, **source.adapter_hub}
    path = cached_file(source.name, "adapter_model.safetensors", **options)
    if path is None:
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # the file is not a mapping
            for name in names:
                # In full, or the output side of LoRA on the head, or the input side of LoRA on the embedding.
                dimensions = {"weight": 0, "base_layer.weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}
                dimension = dimensions.get(key.rpartition(f".{name}.")[2])
                if dimension is not None:
                    return file.get_slice(key).get_shape()[dimension]
    return None

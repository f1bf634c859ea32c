"""Loading tokenizers and adding tokens, under the names that scripts for Unsloth import."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unsloth_fast.models.tokenizers import grow_embeddings
from unsloth_ref import checks

__all__ = ["add_new_tokens", "check_tokenizer", "load_correct_tokenizer"]


def add_new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str] = (),
    method: str = "mean",
    interpolation: float = 0.5,
) -> None:
    """Add tokens to a tokenizer, and rows for them to the model's embedding and head; call it before adding adapters.

    Args:
        model: the model; changed in place. Its embedding is never made smaller.
        tokenizer: its tokenizer; changed in place.
        new_tokens: the tokens; those that the tokenizer has already are left out.
        method: only "mean": transformers draws the new rows around the mean of all rows, with their covariance.
        interpolation: ignored, as it belongs to another method.

    Raises:
        ValueError: no tokens, another method, or a model with an adapter.
    """
    checks.one_of("method", method, ("mean",))
    if not new_tokens or isinstance(new_tokens, str):
        raise ValueError(f"new_tokens: got {new_tokens!r}; allowed: a list of tokens")
    if hasattr(model, "peft_config"):
        raise ValueError("model: got one with an adapter; allowed: one without, so call get_peft_model afterwards")
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in new_tokens if token not in known])
    grow_embeddings(model, len(tokenizer))


def load_correct_tokenizer(
    tokenizer_name: str,
    model_max_length: int | None = None,
    padding_side: str = "right",
    token: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    fix_tokenizer: bool = True,
) -> PreTrainedTokenizerBase:
    """`transformers.AutoTokenizer.from_pretrained`, with a length and a padding side.

    Args:
        tokenizer_name: its name on the hub, or the path of its folder.
        model_max_length: the maximum number of tokens per text; None for the tokenizer's own.
        padding_side: "right" or "left".
        token: for the hub.
        trust_remote_code: whether code from the repository may run.
        cache_dir: where files of the hub are stored.
        fix_tokenizer: ignored, as the tokenizers of transformers 5 are used as they are.
    """
    options: dict[str, Any] = {"padding_side": padding_side, "token": token, "cache_dir": cache_dir}
    if model_max_length is not None:
        options["model_max_length"] = model_max_length
    return AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=trust_remote_code, **options)


def check_tokenizer(
    model: object, tokenizer: PreTrainedTokenizerBase, *_: object, **__: object
) -> PreTrainedTokenizerBase:
    """The tokenizer itself: a token beyond the model's vocabulary is reported when a trainer is built."""
    return tokenizer

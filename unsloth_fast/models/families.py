"""The model families whose attention takes the backend's rope, one row per family: how their attentions differ.

To add a family, add its row here and a tiny model of it to tests/tiny.py; the tests then cover it. Its attention is
found by name, which transformers derives from the family's, such as LlamaAttention. Nothing else needs a row: norms,
MLPs and the head are recognised by what they compute (see `unsloth_fast.models.structure` and
`unsloth_fast.models.logits`), and documents are kept apart through transformers' interface for attention (see
`unsloth_fast.models.packed`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        window: the attribute of the attention with the sliding window; W sees the keys i-W < j <= i. None for no
            window.
        softcap: the attribute of the attention with the cap on the scores. None for no cap.
    """

    window: str | None = None
    softcap: str | None = None


FAMILIES: dict[str, Family] = {
    "Llama": Family(),
    "Mistral": Family(window="config.sliding_window"),
    "Qwen2": Family(window="sliding_window"),
    "Qwen3": Family(window="sliding_window"),
    "Gemma": Family(),
    "Gemma2": Family(window="sliding_window", softcap="attn_logit_softcapping"),
    "Gemma3": Family(window="sliding_window"),
}

_ATTENTIONS = {f"{name}Attention": family for name, family in FAMILIES.items()}


def family_of(module: object) -> Family | None:
    """The family of an attention; None for an attention of no known class, and for any other module."""
    return _ATTENTIONS.get(type(module).__name__)

"""The model families whose attention is known, one row per family: what its classes are called and how they differ.

To add a family, add its row here and a tiny model of it to tests/tiny.py; the tests then cover it. Classes are found by
name, which transformers derives from the family's: LlamaAttention, LlamaModel. Norms, MLPs and the head need no row:
they are recognised by what they compute (see `unsloth_fast.models.structure` and `unsloth_fast.models.logits`).
"""

from dataclasses import dataclass
from typing import Literal

Part = Literal["attention", "stack"]


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        window: the attribute of the attention with the sliding window; W sees the keys i-W < j <= i. None for no
            window.
        softcap: the attribute of the attention with the cap on the scores. None for no cap.
        stack: the class of the stack of layers where it is not the family's name with "Model".
    """

    window: str | None = None
    softcap: str | None = None
    stack: str | None = None

    def classes(self, name: str) -> dict[str, Part]:
        """The part of a model that each known class is, for the family of this name."""
        return {f"{name}Attention": "attention", self.stack or f"{name}Model": "stack"}


FAMILIES: dict[str, Family] = {
    "Llama": Family(),
    "Mistral": Family(window="config.sliding_window"),
    "Qwen2": Family(window="sliding_window"),
    "Qwen3": Family(window="sliding_window"),
    "Gemma": Family(),
    "Gemma2": Family(window="sliding_window", softcap="attn_logit_softcapping"),
    "Gemma3": Family(window="sliding_window", stack="Gemma3TextModel"),
}

_CLASSES: dict[str, tuple[Family, Part]] = {
    class_name: (family, part) for name, family in FAMILIES.items() for class_name, part in family.classes(name).items()
}


def family_and_part(module: object) -> tuple[Family, Part] | tuple[None, None]:
    """The family of a module and the part of a model that it is; (None, None) for a module of no known class."""
    return _CLASSES.get(type(module).__name__, (None, None))


def family_of(module: object, part: Part) -> Family | None:
    """The family of a module that is this part of a model; None for any other module."""
    family, found = family_and_part(module)
    return family if found == part else None

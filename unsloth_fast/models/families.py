"""The known model families, one row per family: what their classes are called and how they differ.

To add a family, add its row here and a tiny model of it to tests/tiny.py; the tests then cover it. Classes are found by
name, which transformers derives from the family's: LlamaRMSNorm, LlamaMLP, LlamaAttention, LlamaForCausalLM.
"""

from dataclasses import dataclass
from typing import Literal

from unsloth_ref.types import Casting

Part = Literal["norm", "mlp", "attention", "causal_lm"]


@dataclass(frozen=True)
class Norm:
    """How a family's RMSNorm works.

    Attributes:
        eps: the name of the attribute with eps.
        offset: added to the weight.
        casting: how the result is rounded, as in `rms_norm`.
    """

    eps: str
    offset: float
    casting: Casting


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        norm: its RMSNorm. None for a family of which only the head is known: the modules below it are left unchanged.
        window: the attribute of the attention with the sliding window; W sees the keys i-W < j <= i. None for no
            window.
        softcap: the attribute of the attention with the cap on the scores. None for no cap.
        logit_scale: the field of the config with the factor on the logits. None for 1.
        logit_softcap: the field of the config with the cap on the logits, applied after the factor. None for no cap.
    """

    norm: Norm | None = None
    window: str | None = None
    softcap: str | None = None
    logit_scale: str | None = None
    logit_softcap: str | None = None

    def classes(self, name: str) -> dict[str, Part]:
        """The part of a model that each known class is, for the family of this name."""
        if self.norm is None:
            return {f"{name}ForCausalLM": "causal_lm"}
        return {
            f"{name}RMSNorm": "norm",
            f"{name}MLP": "mlp",
            f"{name}Attention": "attention",
            f"{name}ForCausalLM": "causal_lm",
        }


LLAMA_NORM = Norm(eps="variance_epsilon", offset=0.0, casting="llama")
GEMMA_NORM = Norm(eps="eps", offset=1.0, casting="gemma")

FAMILIES: dict[str, Family] = {
    "Llama": Family(LLAMA_NORM),
    "Mistral": Family(LLAMA_NORM, window="config.sliding_window"),
    "Qwen2": Family(LLAMA_NORM, window="sliding_window"),
    "Qwen3": Family(LLAMA_NORM, window="sliding_window"),
    "Gemma": Family(GEMMA_NORM),
    "Gemma2": Family(
        GEMMA_NORM,
        window="sliding_window",
        softcap="attn_logit_softcapping",
        logit_softcap="final_logit_softcapping",
    ),
    "Gemma3": Family(
        GEMMA_NORM,
        window="sliding_window",
        logit_softcap="final_logit_softcapping",
    ),
    "Phi3": Family(),
    "SmolLM3": Family(),
    "Cohere": Family(logit_scale="logit_scale"),
    "Cohere2": Family(logit_scale="logit_scale"),
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

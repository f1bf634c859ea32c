"""In which situations is a model bisected? In those of the laws that compare one step with the untouched model."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Situation:
    """What a model runs in.

    Attributes:
        rows: how documents become batches: all in one row where a trainer packs and else padded, padded, or one batch
            for each document.
        adapted: whether linear layers and experts have LoRA, which alone is trained.
        evaluated: whether the model is in evaluation mode and makes no gradients.
        checkpointed: whether layers are computed again in the backward pass.
    """

    rows: Literal["packed", "padded", "alone"]
    adapted: bool = False
    evaluated: bool = False
    checkpointed: bool = False


# By law, in the order in which they are tried.
SITUATIONS: dict[str, Situation] = {
    "padding_free": Situation("packed"),
    "gradients": Situation("padded"),
    "accumulated": Situation("alone"),
    "evaluated": Situation("packed", evaluated=True),
    "checkpointed": Situation("packed", checkpointed=True),
    "adapters": Situation("packed", adapted=True),
}

"""The trainer's arguments."""

import math
from dataclasses import dataclass, field
from numbers import Real

from trl import SFTConfig

from unsloth_fast import backends


@dataclass
class UnslothTrainingArguments(SFTConfig):
    """`trl.SFTConfig` with a learning rate for the embeddings and the choice of backend.

    Args:
        embedding_learning_rate: learning rate of whatever trains the token embedding or the output head; None for
            `learning_rate`.
        backend: "auto", "fast" or "reference", with single operations set apart or not: "fast,rms_norm=reference". None
            for the environment variable UNSLOTH_BACKEND, or "auto" where that is not set.

    Raises:
        ValueError: embedding_learning_rate is no finite number from 0, backend names something unknown, or what
            `trl.SFTConfig` raises.
    """

    embedding_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of whatever trains the token embedding or the output head: the modules themselves, "
            "`modules_to_save`, LoRA on them, trainable tokens. `None` for `learning_rate`."
        },
    )
    backend: str | None = field(
        default=None,
        metadata={
            "help": "Implementation of the operations: 'auto', 'fast' or 'reference', with single operations set apart "
            "or not, as in 'fast,rms_norm=reference'. `None` for the environment variable UNSLOTH_BACKEND, or 'auto'."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields, TRL's and ours."""
        super().__post_init__()
        rate = self.embedding_learning_rate
        if rate is not None and not (isinstance(rate, Real) and math.isfinite(rate) and rate >= 0):
            raise ValueError(f"embedding_learning_rate: got {rate!r}; allowed: a finite number from 0, or None")
        if self.backend is not None:
            backends.parse(self.backend)

"""The trainer's arguments, in today's names and in older ones."""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from unsloth_fast import backends


@dataclass
class UnslothTrainingArguments(SFTConfig):
    """`trl.SFTConfig` with a learning rate for the embeddings, the choice of backend, and padding-free by itself.

    Args:
        padding_free: whether the documents of a batch are laid end to end in one row instead of padded to the longest.
            None for wherever the model and the data allow it.
        embedding_learning_rate: learning rate of whatever trains the token embedding or the output head; None for
            `learning_rate`.
        backend: "auto", "fast" or "reference", with single operations set apart or not: "fast,rms_norm=reference". None
            for the environment variable UNSLOTH_BACKEND, or "auto" where that is not set.

    Raises:
        ValueError: embedding_learning_rate is no finite number from 0, backend names something unknown, or what
            `trl.SFTConfig` raises.
    """

    padding_free: bool | None = field(  # type: ignore[assignment]  # TRL's has no third state
        default=None,
        metadata={
            "help": "Whether the documents of a batch are laid end to end in one row instead of padded to the longest. "
            "`None` for wherever the model and the data allow it."
        },
    )
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


def settled(args: TrainingArguments | None, model: Any) -> SFTConfig:
    """The arguments as a configuration of TRL's that the trainer may change without changing the user's.

    Args:
        args: what the user gave: a `trl.SFTConfig`, of which a copy is made; a `transformers.TrainingArguments`, whose
            values are taken over; None for the defaults.
        model: the model, or the name or path of one, after which the output folder is called where args is None.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        return UnslothTrainingArguments(f"{name.rstrip('/').split('/')[-1]}-SFT")  # as TRL calls it
    if isinstance(args, SFTConfig):
        return copy.copy(args)
    values: dict[str, Any] = args.to_dict() | {"hub_token": args.hub_token}  # to_dict hides the token
    return UnslothTrainingArguments(**values)


def migrated(
    args: SFTConfig,
    keywords: Mapping[str, Any],
    trainer_parameters: Collection[str],
    migrate_keywords: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trainer's keywords in today's names, and those that are the configuration's, which are set in args.

    Args:
        args: changed in place.
        keywords: what the trainer was called with, in names of any release of TRL.
        trainer_parameters: the names that the trainer takes.
        migrate_keywords: the training piece of that name.

    Raises:
        TypeError: a name that neither the trainer nor the configuration ever had.
        ValueError: two names of one thing, with different values.
    """
    names = [entry.name for entry in fields(args) if entry.init]
    kept, updates = migrate_keywords(trainer_parameters, names, keywords)
    for name, value in updates.items():
        setattr(args, name, value)
    return kept, updates

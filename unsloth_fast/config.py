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
from unsloth_fast.models.checkpointing import enable_checkpointing
from unsloth_fast.models.head import without_adapter

_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # of transformers, the latter since 5.2x


@dataclass
class UnslothTrainingArguments(SFTConfig):
    """`trl.SFTConfig` with a learning rate for the embeddings, the choice of backend, and padding-free by itself.

    Args:
        gradient_checkpointing: whether the backward pass makes activations again instead of keeping them. None for what
            was asked of the model by `use_gradient_checkpointing`, or True, TRL's default, where nothing was. The other
            name that transformers has for it, activation_checkpointing, will do as well.
        padding_free: whether the documents of a batch are laid end to end in one row instead of padded to the longest.
            None for wherever the model and the data allow it.
        embedding_learning_rate: learning rate of whatever trains the token embedding or the output head; None for
            `learning_rate`.
        backend: "auto", "fast" or "reference", with single operations set apart or not: "fast,rms_norm=reference". None
            for the environment variable UNSLOTH_BACKEND, or "auto" where that is not set.

    Raises:
        ValueError: embedding_learning_rate is no finite number from 0, backend names something unknown, a batch size
            or the number of accumulation steps is below 1, or what `trl.SFTConfig` raises.
    """

    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]  # TRL's has no third state
        default=None,
        metadata={
            "help": "Whether the backward pass makes activations again instead of keeping them. `None` for what was "
            "asked of the model, or `True` where nothing was."
        },
    )
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
        for name in _COUNTS:
            if not (isinstance(value := getattr(self, name), int) and value >= 1):
                raise ValueError(f"{name}: got {value!r}; allowed: an integer from 1")
        says_nothing = all(getattr(self, name, None) is None for name in _CHECKPOINTING)
        super().__post_init__()
        if says_nothing:  # transformers made it False
            _set_checkpointing(self, None)
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

    Raises:
        TypeError: args is something else.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        return UnslothTrainingArguments(f"{name.rstrip('/').split('/')[-1]}-SFT")  # as TRL calls it
    if isinstance(args, SFTConfig):
        return copy.copy(args)
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args: got {type(args).__name__}; allowed: UnslothTrainingArguments, or TRL's or transformers'"
        )
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


def settle_checkpointing(
    args: SFTConfig, given: TrainingArguments | None, model: Any, updates: Mapping[str, Any]
) -> None:
    """Decide on gradient checkpointing: as the arguments say, or else as was asked of the model, or else as TRL does.

    A `trl.SFTConfig` that has True and a `transformers.TrainingArguments` that has False, their defaults, say nothing.

    Args:
        args: changed in place.
        given: what the user gave, of which args was made.
        model: the model, or the name or path of one; checkpointing that it was loaded with is turned off where the
            arguments say False.
        updates: the fields that were said to the trainer itself.
    """
    asked = getattr(model, "unsloth_gradient_checkpointing", None)
    said = next((updates[name] for name in reversed(_CHECKPOINTING) if name in updates), None)
    silent = None if given is None or isinstance(given, UnslothTrainingArguments) else isinstance(given, SFTConfig)
    if said is None and args.gradient_checkpointing is not silent:
        said = args.gradient_checkpointing
    default = silent is not False if asked is None else bool(asked)
    _set_checkpointing(args, default if said is None else said)
    if asked and not args.gradient_checkpointing:
        enable_checkpointing(without_adapter(model), False)


def _set_checkpointing(args: SFTConfig, value: bool | None) -> None:
    for name in _CHECKPOINTING:
        if hasattr(args, name):
            setattr(args, name, value)

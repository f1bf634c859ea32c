"""The trainer's arguments, in today's names and in older ones."""

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from unsloth_fast import backends
from unsloth_fast.keywords import split_keywords
from unsloth_fast.models.checkpointing import enable_checkpointing
from unsloth_fast.models.head import without_adapter

_COUNTS = {  # from
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "pad_to_multiple_of": 1,
}
_RATES = ("learning_rate", "embedding_learning_rate", "weight_decay", "adam_epsilon", "neftune_noise_alpha")
_SHARES = {  # up to, and in words
    "adam_beta1": (math.nextafter(1.0, 0.0), "a number from 0 to less than 1"),
    "adam_beta2": (math.nextafter(1.0, 0.0), "a number from 0 to less than 1"),
    "label_smoothing_factor": (1.0, "a number from 0 to 1"),
}
_OPTIONAL = ("dataloader_prefetch_factor", "pad_to_multiple_of", "embedding_learning_rate", "neftune_noise_alpha")
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
        ValueError: a field that transformers does not check is no count, no finite number from 0, or no number up
            to 1, as it has to be; backend names something unknown; or what `trl.SFTConfig` raises.
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
        says_nothing = all(getattr(self, name, None) is None for name in _CHECKPOINTING)
        super().__post_init__()
        if says_nothing:  # transformers made it False
            _set_checkpointing(self, None)
        values: dict[str, Any] = {name: getattr(self, name) for name in (*_COUNTS, *_RATES, *_SHARES)}
        for name, least in _COUNTS.items():
            fits = isinstance(values[name], int) and values[name] >= least
            _check(name, values[name], fits, f"an integer from {least}")
        for name in _RATES:
            _check(name, values[name], _is_rate(values[name]), "a finite number from 0")
        for name, (most, words) in _SHARES.items():
            _check(name, values[name], _is_rate(values[name]) and values[name] <= most, words)
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
    args: SFTConfig, keywords: Mapping[str, Any], trainer_parameters: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trainer's keywords in today's names, and those that are the configuration's, which are set in args.

    Args:
        args: changed in place.
        keywords: what the trainer was called with, in names of any release of TRL.
        trainer_parameters: the names that the trainer takes.

    Raises:
        TypeError: a name that neither the trainer nor the configuration ever had.
        ValueError: two names of one thing, with different values.
    """
    names = [entry.name for entry in fields(args) if entry.init]
    kept, updates = split_keywords(trainer_parameters, names, keywords)
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


def check_device(args: TrainingArguments) -> None:
    """Raise for what the run's device cannot do.

    Raises:
        ValueError: activation_offloading on a CPU, where TRL finds no device to take activations from.
    """
    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise ValueError("activation_offloading: got True on a CPU; allowed: False, as there is no GPU to relieve")


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    """Raise for a field that does not fit; None does where it is optional."""
    optional = name in _OPTIONAL
    if not (fits or (optional and value is None)):
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}{', or None' if optional else ''}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def _set_checkpointing(args: SFTConfig, value: bool | None) -> None:
    for name in _CHECKPOINTING:
        if hasattr(args, name):
            setattr(args, name, value)

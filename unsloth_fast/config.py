"""The trainer's arguments, in today's names and in older ones."""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from trl import SFTConfig

from unsloth_fast import backends

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
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # of transformers, the latter since 5.2x


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
        says_nothing = all(getattr(self, name, None) is None for name in CHECKPOINTING)
        super().__post_init__()
        if says_nothing:  # transformers made it False
            for name in CHECKPOINTING:
                if hasattr(self, name):
                    setattr(self, name, None)
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


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    """Raise for a field that does not fit; None does where it is optional."""
    optional = name in _OPTIONAL
    if not (fits or (optional and value is None)):
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}{', or None' if optional else ''}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < math.inf

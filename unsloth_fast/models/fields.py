"""The fields of a model's configuration that trainers change, which are saved as they were loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

# TRL turns on the load-balancing loss of experts, and sets its coefficient.
_CHANGED = ("use_cache", "output_router_logits", "router_aux_loss_coef")
_LOADED = "unsloth_loaded"  # the attribute of a model with the values that were loaded


def changed_by_trainers(config: PreTrainedConfig) -> list[dict[str, object]]:
    """The values of these fields, in a configuration and in its text part; without those that it does not have."""
    return [{name: value for name, value in vars(part).items() if name in _CHANGED} for part in _parts(config)]


def remember_fields(model: Any) -> None:
    """Let a model remember the values that these fields have when this function is first called on it."""
    if _LOADED not in vars(model):
        setattr(model, _LOADED, changed_by_trainers(model.config))


def loaded_fields(model: Any) -> list[dict[str, object]]:
    """The values that a model remembers, or those that it has."""
    return getattr(model, _LOADED, changed_by_trainers(model.config))


def restore(config: PreTrainedConfig, values: list[dict[str, object]]) -> None:
    """Give a configuration the values that `changed_by_trainers` found."""
    for part, found in zip(_parts(config), values, strict=True):
        for name in _CHANGED:
            vars(part).pop(name, None)
        vars(part).update(found)


@contextmanager
def with_values(config: PreTrainedConfig, values: list[dict[str, object]]) -> Iterator[None]:
    """Let a configuration have other values, as `restore` gives them, for a while."""
    now = changed_by_trainers(config)
    restore(config, values)
    try:
        yield
    finally:
        restore(config, now)


@contextmanager
def kept_fields(trainer: Any, config: PreTrainedConfig) -> Iterator[list[dict[str, Any]]]:
    """Call TRL's constructor within the context: the configuration of its model keeps the fields as they were loaded.

    Those are saved, and TRL's router logits would break a generation with padding. The loss needs TRL's: `with_values`.

    Args:
        trainer: the trainer that is built within the context.
        config: the configuration of its model, or one that was loaded from the same place.

    Yields:
        A list that holds the values that TRL gave them once the context ends.
    """
    loaded, changed = changed_by_trainers(config), list[dict[str, Any]]()
    yield changed
    changed += changed_by_trainers(trainer.model.config)
    restore(trainer.model.config, loaded)


def _parts(config: PreTrainedConfig) -> list[Any]:
    return list({id(part): part for part in (config, config.get_text_config())}.values())

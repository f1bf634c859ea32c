"""Which keywords of a trainer belong to its config today, and what older releases of TRL called them."""

from collections.abc import Collection, Mapping
from typing import TypeVar

Value = TypeVar("Value")

# Keywords of older releases of TRL, and their names today.
RENAMED = {"tokenizer": "processing_class", "max_seq_length": "max_length"}


def split_keywords(
    trainer_parameters: Collection[str], config_fields: Collection[str], keywords: Mapping[str, Value]
) -> tuple[dict[str, Value], dict[str, Value]]:
    """Split keywords into those of the trainer and those of its config, renaming those of older releases of TRL.

    A name that the trainer or the config still has is kept: `tokenizer` becomes `processing_class`, and
    `max_seq_length` becomes `max_length`, only if the old name is unknown.

    Args:
        trainer_parameters: names of the trainer's parameters.
        config_fields: names of the config's fields.
        keywords: the keywords that the trainer was called with.

    Returns:
        The keywords of the trainer, and the fields of the config with their values. Nothing is dropped: a keyword
        passed under both its names, with one value, appears once.

    Raises:
        TypeError: a keyword that neither the trainer nor the config has.
        ValueError: a keyword passed under both its names, with different values.
    """
    known = {*trainer_parameters, *config_fields}
    renamed: dict[str, Value] = {}
    for passed, value in keywords.items():
        name = passed if passed in known else RENAMED.get(passed, passed)
        if name not in known:
            raise TypeError(
                f"{passed}: got an unknown keyword; allowed: parameters of the trainer and fields of its config"
            )
        if name in renamed and renamed[name] is not value and renamed[name] != value:
            old = next(old for old, new in RENAMED.items() if new == name)
            raise ValueError(f"{old}: got {keywords[old]!r}, and {name}={keywords[name]!r}; allowed: one of the two")
        renamed[name] = value
    trainer = {name: value for name, value in renamed.items() if name in trainer_parameters}
    return trainer, {name: value for name, value in renamed.items() if name not in trainer}

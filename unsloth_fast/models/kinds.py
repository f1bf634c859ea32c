"""Whether an argument has the right kind of value: a whole number, a number, a switch, names, indices.

Each function raises a ValueError that names the argument, the value and what is allowed, before torch, peft or
transformers fail on the value in words of their own.
"""

import math
from collections.abc import Iterable, Mapping

from unsloth_ref import checks


def whole(name: str, value: object, low: int | None = None) -> None:
    """Raise unless the value is an int of at least low; True and 2.0 are refused."""
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        bound = "" if low is None else f" from {low}"
        raise ValueError(f"{name}: got {value!r}; allowed: a whole number{bound}, as an int")


def number(name: str, value: object) -> None:
    """Raise unless the value is a finite int or float."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}; allowed: a finite number")


def switches(values: Mapping[str, object]) -> None:
    """Raise unless each value is True, False or None: the text "False" would turn a switch on."""
    for name, value in values.items():
        checks.one_of(name, value, (True, False, None))


def names(name: str, value: object, *, pattern: bool = False) -> None:
    """Raise unless the value is None or several texts; with pattern also one text."""
    several = isinstance(value, list | tuple | set | frozenset) and all(isinstance(entry, str) for entry in value)
    if not (value is None or several or (pattern and isinstance(value, str))):
        alone = ", a pattern" if pattern else ""
        raise ValueError(f"{name}: got {value!r}; allowed: a list of names{alone}, or None")


def indices(name: str, values: object, count: int | None, what: str) -> None:
    """Raise unless the values are ints from 0 to count - 1, of which `what` says what they count; None for no end."""
    end = "" if count is None else f" to {count - 1}"
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name}: got {values!r}; allowed: a list of {what}, 0{end}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (count is not None and value >= count):
            raise ValueError(f"{name}: got {value!r}; allowed: {what}, 0{end}")

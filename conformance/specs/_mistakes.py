"""Mistakes in one input, which several specs share."""

from collections.abc import Callable

from torch import Tensor

from conformance.spec import ErrorCase, mistake


def wrong_input(
    what: str, raises: type[Exception], *, undefined: bool = False, **change: Callable[[Tensor], Tensor]
) -> ErrorCase:
    """A mistake in one input, which `change` makes of a right one; see `mistake`."""
    ((name, wrong),) = change.items()
    return mistake(what, raises, name, lambda i: {name: wrong(i[name])}, undefined=undefined)


def one_column_short(name: str, *, undefined: bool = True) -> ErrorCase:
    """An input without its last column."""
    return mistake(
        f"{name} is one column short", ValueError, name, lambda i: {name: i[name][..., :-1]}, undefined=undefined
    )


def one_row_short(name: str) -> ErrorCase:
    """A matrix without its last row."""
    return mistake(f"{name} is one row short", ValueError, name, lambda i: {name: i[name][:-1]}, undefined=True)


def one_short(name: str) -> ErrorCase:
    """A vector without its last entry."""
    return mistake(f"{name} is one short", ValueError, name, lambda i: {name: i[name][:-1]}, undefined=True)

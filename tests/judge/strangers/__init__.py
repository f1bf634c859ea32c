"""Operations that the project does not have: their references, and wrong and right kernels of each."""

from collections.abc import Callable
from typing import Any

RIGHT: dict[str, list[str]] = {}
WRONG: dict[str, list[tuple[str, tuple[str, ...]]]] = {}


def right(op: str) -> Callable[[Any], Any]:
    """Register a right kernel of an operation."""

    def register(kernel: Any) -> Any:
        RIGHT.setdefault(op, []).append(kernel.__name__)
        return kernel

    return register


def wrong(op: str, *properties: str) -> Callable[[Any], Any]:
    """Register a wrong kernel of an operation."""

    def register(kernel: Any) -> Any:
        WRONG.setdefault(op, []).append((kernel.__name__, properties))
        return kernel

    return register

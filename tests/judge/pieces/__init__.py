"""Wrong and right training pieces, most of the wrong ones mistakes that trainers have made.

Each is a backend: `tests.judge.pieces.pack.first_fit`. One file a piece, or a few.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any

from unsloth_ref import training

Function = Callable[..., Any]


@dataclass
class Collected:
    """The backends of one file.

    Attributes:
        wrong: by name: the piece, and the properties that may find it.
        right: by name: the piece.
    """

    wrong: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    right: dict[str, str] = field(default_factory=dict)

    def fails(self, op: str, *laws: str, contract: bool = True) -> Callable[[Function], SimpleNamespace]:
        """Make a function a wrong backend; unless contract, its signature is its own."""

        def register(function: Function) -> SimpleNamespace:
            self.wrong[function.__name__] = op, laws
            return _backend(op, function, contract)

        return register

    def passes(self, op: str) -> Callable[[Function], SimpleNamespace]:
        """Make a function a right backend."""

        def register(function: Function) -> SimpleNamespace:
            self.right[function.__name__] = op
            return _backend(op, function, True)

        return register


def _backend(op: str, function: Function, contract: bool) -> SimpleNamespace:
    return SimpleNamespace(**{op: wraps(getattr(training, op))(function) if contract else function})

"""Wrong and right training pieces; most of the wrong ones are mistakes of real trainers.

Each is a backend, such as `tests.judge.pieces.pack.first_fit`. There is one file per piece, or for a few of them.
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
        wrong: the piece and the properties that must fail, by the name of the backend.
        right: the piece, by the name of the backend.
    """

    wrong: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    right: dict[str, str] = field(default_factory=dict)

    def fails(self, op: str, *properties: str, contract: bool = True) -> Callable[[Function], SimpleNamespace]:
        """Register a function as a wrong backend, with the signature of the contract unless contract is False."""

        def register(function: Function) -> SimpleNamespace:
            self.wrong[function.__name__] = op, properties
            return _backend(op, function, contract)

        return register

    def passes(self, op: str) -> Callable[[Function], SimpleNamespace]:
        """Register a function as a right backend."""

        def register(function: Function) -> SimpleNamespace:
            self.right[function.__name__] = op
            return _backend(op, function, True)

        return register


def _backend(op: str, function: Function, contract: bool) -> SimpleNamespace:
    return SimpleNamespace(**{op: wraps(getattr(training, op))(function) if contract else function})

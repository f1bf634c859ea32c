"""What a law is: a sentence that holds for every model with operations placed under it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conformance.models.trial import ModelTrial

    Check = Callable[[ModelTrial], float | None]


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: on the command line.
        statement: what holds, in one sentence.
        check: called with a ModelTrial; raises Failure if the law does not hold, and Unchecked if it says nothing about
            the model. Returns the fraction of the error budget that was used, or None if the law has no budget.
    """

    name: str
    statement: str
    check: Check

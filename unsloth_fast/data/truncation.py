"""Truncation: which tokens of a document are kept. TRL cuts them off; the checks here know beforehand what is left."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from trl import SFTConfig

Values = TypeVar("Values", bound=Sequence[int])


@dataclass(frozen=True)
class Truncation:
    """The tokens of a document that are kept.

    Attributes:
        max_length: the most tokens; None keeps all of them.
        keep_end: whether the last tokens are kept rather than the first.
    """

    max_length: int | None = None
    keep_end: bool = False

    def lengths(self, lengths: np.ndarray) -> np.ndarray:
        """How many tokens are kept of documents of these lengths, [documents] int64."""
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def apply(self, values: Values) -> Values:
        """The values, one per token, that are kept of one document."""
        if self.max_length is None:
            return values
        return values[-self.max_length :] if self.keep_end else values[: self.max_length]  # type: ignore[return-value]


def truncation_of(args: SFTConfig, packing: bool) -> Truncation:
    """The truncation that the arguments ask for: of the packing strategies only "bfd" cuts, always at the end."""
    if packing:
        return Truncation(args.max_length if args.packing_strategy == "bfd" else None)
    return Truncation(args.max_length, getattr(args, "truncation_mode", "keep_start") == "keep_end")  # since TRL 1.0


def without_truncation(args: SFTConfig) -> SFTConfig:
    """A copy of the arguments for tokenizing alone: truncation, packing and shuffling come later."""
    args = copy.copy(args)
    args.max_length, args.shuffle_dataset = None, False
    return args

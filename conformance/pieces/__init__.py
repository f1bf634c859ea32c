"""The declarations of the training pieces: one file per piece, each with a module-level `piece`."""

import sys
from collections.abc import Mapping
from functools import cache

import unsloth_ref.training
from conformance.declarations import load
from conformance.piece import Piece


@cache
def pieces() -> Mapping[str, Piece]:
    """Every training piece, by name.

    Raises:
        SpecError: a piece of `unsloth_ref.training` has no file in conformance/pieces, or a file has no piece or one of
            another name.
    """
    return load(sys.modules[__name__], "piece", Piece, unsloth_ref.training)

"""Truncation: which tokens of a document are kept, and which arguments ask for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl import SFTConfig

from tests.trainer.runs import arguments
from unsloth_fast.data.truncation import Truncation, truncation_of, without_truncation

HAS_MODE = hasattr(SFTConfig, "truncation_mode")
since_trl_1 = pytest.mark.skipif(not HAS_MODE, reason="truncation_mode exists since TRL 1.0")


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        (Truncation(), [[], [5], [5, 6, 7, 8]]),
        (Truncation(keep_end=True), [[], [5], [5, 6, 7, 8]]),
        (Truncation(3), [[], [5], [5, 6, 7]]),
        (Truncation(3, keep_end=True), [[], [5], [6, 7, 8]]),
        (Truncation(4), [[], [5], [5, 6, 7, 8]]),
        (Truncation(1, keep_end=True), [[], [5], [8]]),
    ],
    ids=str,
)
def test_the_kept_tokens_and_their_number(truncation: Truncation, expected: list[list[int]]) -> None:
    """`apply` keeps as many values as `lengths` predicts."""
    documents: list[list[int]] = [[], [5], [5, 6, 7, 8]]
    assert [truncation.apply(document) for document in documents] == expected
    lengths = truncation.lengths(np.array([0, 1, 4]))
    assert lengths.tolist() == [len(kept) for kept in expected]


@pytest.mark.parametrize(
    ("options", "packing", "expected"),
    [
        ({"max_length": 8}, False, Truncation(8)),
        ({"max_length": None}, False, Truncation()),
        ({"max_length": 8, "packing_strategy": "bfd"}, True, Truncation(8)),
        ({"max_length": 8, "packing_strategy": "bfd_split"}, True, Truncation()),
        ({"max_length": 8, "packing_strategy": "wrapped"}, True, Truncation()),
        ({"max_length": 8, "packing_strategy": "bfd_split"}, False, Truncation(8)),
        pytest.param({"max_length": 8, "truncation_mode": "keep_end"}, False, Truncation(8, True), marks=since_trl_1),
        pytest.param({"max_length": 8, "truncation_mode": "keep_end"}, True, Truncation(8), marks=since_trl_1),
    ],
)
def test_the_truncation_that_the_arguments_ask_for(
    tmp_path: Path, options: dict[str, Any], packing: bool, expected: Truncation
) -> None:
    """Of the packing strategies only "bfd" cuts documents, always at the end."""
    assert truncation_of(arguments(tmp_path, SFTConfig, **options), packing) == expected


def test_arguments_without_truncation_are_a_copy(tmp_path: Path) -> None:
    args = arguments(tmp_path, SFTConfig, max_length=8, learning_rate=0.5)
    args.shuffle_dataset = True  # TRL's field since 0.26
    copied = without_truncation(args)
    assert (copied.max_length, copied.shuffle_dataset, copied.learning_rate) == (None, False, 0.5)
    assert (args.max_length, args.shuffle_dataset) == (8, True)

"""Packing: known plans, TRL's packing of one batch, large data sets, and data sets of the trainer."""

import time
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from trl import data_utils

import unsloth_fast.training
import unsloth_ref.training
from unsloth_fast.data import packing
from unsloth_fast.data.packing import pack_dataset
from unsloth_ref.types import PackingPlan

PACKAGES = [unsloth_ref.training, unsloth_fast.training]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)

# Since 1.0 TRL packs documents without tokens, and splits documents.
OLD_TRL = Version(trl.__version__) < Version("1")

FIVE = [[1, 2, 3, 4, 5], [6, 7], [], [8, 9, 10], [11]]


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def rows(plan: PackingPlan, documents: list[list[int]]) -> list[list[list[int]]]:
    """The parts of documents in each packed row."""
    spans = zip(plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True)
    parts = [documents[document][start : start + length] for document, start, length in spans]
    return [parts[first:last] for first, last in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]


@each_package
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("bfd", [[[1, 2, 3, 4]], [[8, 9, 10], [11]], [[6, 7]]]),
        ("bfd_split", [[[1, 2, 3, 4]], [[8, 9, 10], [5]], [[6, 7], [11]]]),
        ("wrapped", [[[1, 2, 3, 4]], [[5], [6, 7], [8]], [[9, 10], [11]]]),
    ],
)
def test_five_documents_in_rows_of_four(package: ModuleType, strategy: Any, expected: list[Any]) -> None:
    """The example of TRL's documentation is truncated, split and wrapped."""
    assert rows(package.pack([len(document) for document in FIVE], 4, strategy=strategy), FIVE) == expected


@each_package
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_pack(package: ModuleType, strategy: Any, lengths: list[int]) -> None:
    """There are no rows, and offsets are [0]."""
    plan = package.pack(lengths, 4, strategy=strategy)
    assert [part.tolist() for part in (plan.documents, plan.starts, plan.lengths, plan.offsets)] == [[], [], [], [0]]
    assert plan.documents.dtype == torch.int64
    assert package.packed_indices(plan, torch.tensor([0, *lengths]).cumsum(0)).tolist() == []


@given(
    lengths=st.lists(st.integers(int(OLD_TRL), 60), min_size=1, max_size=80).filter(any),
    capacity=st.integers(1, 48),
    strategy=st.sampled_from(["bfd", "wrapped"] if OLD_TRL else ["bfd", "bfd_split", "wrapped"]),
    chunk=st.sampled_from([1, 50, 10**6]),
)
@settings(max_examples=30, deadline=None)
def test_one_batch_is_packed_as_trl_packs_it(lengths: list[int], capacity: int, strategy: Any, chunk: int) -> None:
    """Rows, their order and the types of columns are equal, however many tokens are copied at a time."""
    documents = [list(range(100 * index, 100 * index + length)) for index, length in enumerate(lengths)]
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "completion_mask": datasets.List(datasets.Value("bool"))}
    )
    masks = [[token % 3 == 0 for token in document] for document in documents]
    dataset = Dataset.from_dict({"input_ids": documents, "completion_mask": masks}, features=features)
    theirs = data_utils.pack_dataset(dataset, capacity, strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "COPIED_TOKENS", chunk)
        for package in PACKAGES:
            ours = pack_dataset(dataset, capacity, strategy, package)
            if strategy != "bfd":  # a column of ours, from which labels of cut documents are found
                ours = ours.remove_columns("document_spans")
            assert ours.features == theirs.features
            assert ours[:] == theirs[:]


def test_a_whole_data_set_needs_fewer_rows_than_its_batches() -> None:
    """TRL packs a thousand rows at a time, and cannot fill the gaps of one batch with documents of another."""
    lengths = torch.randint(1, 513, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    ours = pack_dataset(dataset, 2048, "bfd", unsloth_fast.training)
    theirs = data_utils.pack_dataset(dataset, 2048, "bfd")
    assert -(-sum(lengths) // 2048) <= len(ours) < len(theirs)
    assert sorted(length for row in ours["seq_lengths"] for length in row) == sorted(lengths)


MIXES = {
    "uniform": lambda draw, capacity, n: draw.integers(1, capacity + 1, n),
    "log-normal": lambda draw, capacity, n: np.maximum(draw.lognormal(6, 1.2, n), 1),
    "log-uniform": lambda draw, capacity, n: np.exp(draw.uniform(0, np.log(capacity), n)),
    "thirds to halves": lambda draw, capacity, n: draw.integers(capacity // 3, capacity // 2 + 2, n),
    "short": lambda draw, capacity, n: draw.integers(1, max(2, capacity // 64), n),
}


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [512, 8192, 131072])
@pytest.mark.parametrize("mix", MIXES)
def test_a_million_documents_in_two_seconds(mix: str, capacity: int) -> None:
    """One core suffices for any lengths; no row is empty or too full, and each token is packed exactly once."""
    lengths = torch.from_numpy(MIXES[mix](np.random.default_rng(0), capacity, 10**6).astype(np.int64))
    for strategy in ("bfd", "bfd_split", "wrapped"):
        begin = time.process_time()
        plan = unsloth_fast.training.pack(lengths, capacity, strategy=strategy)
        assert time.process_time() - begin < 2
        held = torch.zeros(len(plan.offsets) - 1, dtype=torch.int64)
        row = torch.arange(len(held)).repeat_interleave(plan.offsets.diff())
        held.index_add_(0, row, plan.lengths)
        assert held.min() >= 1 and held.max() <= capacity
        kept = lengths.clamp(max=capacity) if strategy == "bfd" else lengths
        assert torch.equal(torch.zeros_like(lengths).index_add_(0, plan.documents, plan.lengths), kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mix", "capacity", "documents"),
    [*((mix, capacity, 20_000) for mix in MIXES for capacity in (100, 1024, 4099)), ("log-uniform", 64, 10**6)],
)
def test_never_more_rows_than_trl_needs(mix: str, capacity: int, documents: int) -> None:
    """All documents are in one batch, where TRL packs a million in 10 s (capacity 64) or 36 s (capacity 512)."""
    lengths = MIXES[mix](np.random.default_rng(0), capacity, documents).astype(np.int64)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.nulls(int(lengths.sum())))})
    plan = unsloth_fast.training.pack(torch.from_numpy(lengths), capacity)
    assert len(plan.offsets) - 1 == data_utils._pack_bfd(table, capacity).num_rows


def test_a_selection_is_packed_in_its_own_order() -> None:
    """The indices of a shuffled, filtered or sliced data set are respected."""
    dataset = Dataset.from_dict({"input_ids": [[1], [2, 2], [3, 3, 3], [4]]}).select([3, 1])
    packed = pack_dataset(dataset, 3, "wrapped", unsloth_fast.training)
    # Document, first token and number of tokens of each piece.
    assert packed[:] == {"input_ids": [[4, 2, 2]], "document_spans": [[0, 0, 1, 1, 0, 2]]}


def test_the_same_data_packed_again_have_the_same_fingerprint() -> None:
    """The cache of one is used for the other, and not for another capacity."""
    dataset = Dataset.from_dict({"input_ids": [[1], [2, 2]]})
    one, same, other = (pack_dataset(dataset, size, "bfd", unsloth_fast.training) for size in (3, 3, 2))
    assert one._fingerprint == same._fingerprint != other._fingerprint


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({}, "dataset: got no column"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "got 1 value in labels of row 0; allowed: 2, as many as in input"),
        ({"input_ids": [[1, 2]], "text": ["w1 w2"]}, "got a column text of string; allowed: lists of numbers"),
        ({"input_ids": [[1, 2]], "images": [[[1], [2]]]}, "got a column images of list"),
        ({"input_ids": [[1, 2], None]}, "got 1 row without input_ids"),
    ],
)
def test_columns_that_cannot_be_packed_are_named(columns: dict[str, Any], why: str) -> None:
    """The message names a column that cannot be split like the others."""
    with pytest.raises(ValueError, match=why):
        pack_dataset(Dataset.from_dict(columns), 4, "bfd", unsloth_fast.training)


@each_package
@pytest.mark.parametrize(
    ("arguments", "options", "error", "why"),
    [
        (([3], 0), {}, ValueError, "^capacity: got 0; allowed: an integer of at least 1"),
        (([3], 1.5), {}, TypeError, r"^capacity: got 1\.5"),
        (([3, -2], 4), {}, ValueError, "^lengths: got -2 at index 1"),
        (([[3], [2]], 4), {}, ValueError, r"^lengths: got shape \[2, 1\]"),
        (([3.0], 4), {}, TypeError, r"^lengths: got dtype torch\.float32"),
        (([3], 4), {"strategy": "ffd"}, ValueError, "^strategy: got 'ffd'; allowed: 'bfd', 'bfd_split', 'wrapped'"),
    ],
)
def test_errors_name_the_argument(
    package: ModuleType, arguments: Any, options: dict[str, Any], error: type[Exception], why: str
) -> None:
    """The message has the value and what is allowed."""
    with pytest.raises(error, match=why):
        package.pack(*arguments, **options)


@each_package
def test_offsets_that_do_not_fit_the_plan_are_named(package: ModuleType) -> None:
    """Such offsets have too few documents, or a document that is too short."""
    plan = package.pack([3, 2], 4)
    with pytest.raises(ValueError, match=r"^offsets: got 2 offsets; allowed: at least 3"):
        package.packed_indices(plan, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"^offsets: got 1 token for document 1; allowed: at least 2"):
        package.packed_indices(plan, torch.tensor([0, 3, 4]))

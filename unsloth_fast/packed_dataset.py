"""A data set of documents packed as a whole: every column cut alike, by the plan of a backend's `pack`."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher

from unsloth_ref.types import PackingPlan, Strategy

CHUNK = 2**24  # tokens copied at a time; also keeps Arrow's 32-bit offsets from overflowing


def pack_dataset(dataset: Dataset, capacity: int, strategy: Strategy, training: ModuleType) -> Dataset:
    """Pack documents into rows of at most `capacity` tokens, all of them at once rather than map batch by map batch.

    Args:
        dataset: every column a list of numbers or truth values a document, of the same lengths in all columns:
            input_ids, labels, completion_mask, assistant_masks.
        capacity: tokens of a row, at least 1.
        strategy: as in `pack`.
        training: whose `pack` and `packed_indices`: `unsloth_fast.training` or `unsloth_ref.training`.

    Returns:
        The packed rows, in memory, in columns of the same names and types. Under "bfd" and "bfd_split" a column
        `seq_lengths` holds the tokens of each document of a row; a row of "wrapped" counts as one document.

    Raises:
        ValueError: a column that is no list of numbers, or of other lengths than the first; or what `pack` raises.
    """
    columns = {name: _flat(name, column) for name, column in _table(dataset).items()}
    if not columns:
        raise ValueError("dataset: got no column; allowed: at least one, such as input_ids")
    (first, (_, lengths)), *others = columns.items()
    for name, (_, own) in others:
        if not np.array_equal(own, lengths):
            document = int(np.flatnonzero(own != lengths)[0])
            raise ValueError(
                f"dataset: got {own[document]} values in {name} of row {document};"
                f" allowed: {lengths[document]}, as many as in {first}"
            )
    plan = training.pack(torch.from_numpy(lengths), capacity, strategy=strategy)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    chunks: dict[str, list[pa.Array]] = {name: [] for name in columns}
    spans: list[pa.Array] = []
    for part in _parts(plan):
        indices = training.packed_indices(part, offsets).numpy()
        ends = np.concatenate([[0], np.cumsum(part.lengths.numpy())])[part.offsets.numpy()].astype(np.int32)
        for name, (values, _) in columns.items():
            chunks[name].append(pa.ListArray.from_arrays(ends, values.take(pa.array(indices))))
        held = pa.array(part.lengths.numpy().astype(np.int32))
        spans.append(pa.ListArray.from_arrays(part.offsets.numpy().astype(np.int32), held))
    packed = {name: pa.chunked_array(chunks[name], pa.list_(values.type)) for name, (values, _) in columns.items()}
    if strategy != "wrapped":
        packed["seq_lengths"] = pa.chunked_array(spans, pa.list_(pa.int32()))
    fingerprint = Hasher.hash((dataset._fingerprint, capacity, strategy))
    return Dataset(pa.table(packed), split=dataset.split, fingerprint=fingerprint)


def _table(dataset: Dataset) -> dict[str, pa.ChunkedArray]:
    """The columns as Arrow holds them, in the order of a selection or shuffle."""
    table: Any = dataset.with_format("arrow")[:]
    return {name: table.column(name) for name in table.column_names}


def _flat(name: str, column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """All values of a column of lists one after the other, and how many each list holds."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not _plain(kind.value_type):
        raise ValueError(f"dataset: got a column {name} of {kind}; allowed: lists of numbers, one value a token")
    if column.null_count:
        raise ValueError(f"dataset: got {column.null_count} rows without {name}; allowed: a list in every row")
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    flat = pa.chunked_array([chunk.flatten() for chunk in column.chunks], kind.value_type).combine_chunks()
    if isinstance(flat, pa.ChunkedArray):
        flat = flat.chunk(0)
    return flat, np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)


def _plain(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _parts(plan: PackingPlan) -> Iterator[PackingPlan]:
    """The plan in runs of rows of about CHUNK tokens."""
    ends = torch.cat([plan.lengths.new_zeros(1), plan.lengths.cumsum(0)])[plan.offsets]  # tokens before each row
    row, rows = 0, len(plan.offsets) - 1
    while row < rows:
        stop = max(row + 1, int(torch.searchsorted(ends, ends[row] + CHUNK, right=True)) - 1)
        first, last = int(plan.offsets[row]), int(plan.offsets[stop])
        yield PackingPlan(
            plan.documents[first:last],
            plan.starts[first:last],
            plan.lengths[first:last],
            plan.offsets[row : stop + 1] - first,
        )
        row = stop

"""Packing a data set as a whole, if batching.py allows it, by the plan of a backend's `pack`."""

import logging
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher

from unsloth_fast.data.lists import flat
from unsloth_fast.data.tokens import check_packed_length
from unsloth_ref.checks import counted
from unsloth_ref.types import PackingPlan, Strategy

logger = logging.getLogger(__name__)

COPIED_TOKENS = 2**24  # at a time; also keeps Arrow's 32-bit offsets from overflowing
SPANS = "document_spans"


def check_packed_rows(dataset: Dataset, name: str, max_length: int | None) -> None:
    """Refuse rows that were packed earlier and are longer than max_length: truncation would cut documents apart.

    Raises:
        ValueError: the longest row, and what is allowed.
    """
    check_packed_length(flat(dataset, "input_ids")[1].max(initial=0), name, max_length)


def pack_dataset(dataset: Dataset, capacity: int, strategy: Strategy, training: ModuleType) -> Dataset:
    """Pack documents into rows of at most `capacity` tokens: one plan over the whole data set.

    Args:
        dataset: each row holds one document; each column holds a list of numbers or booleans per document, of the
            same length in all columns: input_ids, labels, completion_mask, assistant_masks.
        capacity: tokens per row, at least 1.
        strategy: as in `pack`.
        training: the module with `pack` and `packed_indices`: `unsloth_fast.training` or `unsloth_ref.training`.

    Returns:
        The packed rows, in memory, in columns of the same names and types. With "bfd" and "bfd_split" a column
        `seq_lengths` holds the length of each document in a row; with "wrapped" each row counts as one document. With
        "bfd_split" and "wrapped", which cut documents, a column `document_spans` holds three numbers for each piece in
        a row: its document, the index of its first token there, and its length.

    Raises:
        ValueError: a column does not hold lists of numbers, or its lengths differ from the first column's; or what
            `pack` raises.
    """
    columns = {name: flat(dataset, name) for name in dataset.column_names}
    if not columns:
        raise ValueError("dataset: got no column; allowed: at least one, such as input_ids")
    (first, (_, lengths)), *others = columns.items()
    for name, (_, own) in others:
        if not np.array_equal(own, lengths):
            document = int(np.flatnonzero(own != lengths)[0])
            raise ValueError(
                f"dataset: got {counted(int(own[document]), 'value')} in {name} of row {document};"
                f" allowed: {lengths[document]}, as many as in {first}"
            )
    plan = training.pack(torch.from_numpy(lengths), capacity, strategy=strategy)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    chunks: dict[str, list[pa.Array]] = {name: [] for name in columns}
    lengths_in_rows: list[pa.Array] = []
    spans: list[pa.Array] = []
    for part in _parts(plan):
        indices = training.packed_indices(part, offsets).numpy()
        ends = np.concatenate([[0], np.cumsum(part.lengths.numpy())])[part.offsets.numpy()].astype(np.int32)
        for name, (values, _) in columns.items():
            chunks[name].append(pa.ListArray.from_arrays(ends, values.take(pa.array(indices))))
        pieces, held = part.offsets.numpy().astype(np.int32), pa.array(part.lengths.numpy().astype(np.int32))
        lengths_in_rows.append(pa.ListArray.from_arrays(pieces, held))
        numbers = torch.stack([part.documents, part.starts, part.lengths], dim=1).flatten().numpy()
        spans.append(pa.ListArray.from_arrays(3 * pieces, pa.array(numbers)))
    packed = {name: pa.chunked_array(chunks[name], pa.list_(values.type)) for name, (values, _) in columns.items()}
    if strategy != "wrapped":
        packed["seq_lengths"] = pa.chunked_array(lengths_in_rows, pa.list_(pa.int32()))
    if strategy != "bfd":
        packed[SPANS] = pa.chunked_array(spans, pa.list_(pa.int64()))
    fingerprint = Hasher.hash((dataset._fingerprint, capacity, strategy))
    return Dataset(pa.table(packed), split=dataset.split, fingerprint=fingerprint)


def log_packing(dataset: Dataset, packed: Dataset, name: str, max_length: int) -> None:
    """Log the number of rows and the share of them that is filled."""
    lengths, rows = (flat(data, "input_ids")[1] for data in (dataset, packed))
    logger.info(
        "%s: %s of %s packed into %s of %d, %.1f %% full",
        *(name, counted(len(lengths), "document"), counted(lengths.sum(), "token"), counted(len(rows), "row")),
        *(max_length, 100 * rows.mean() / max_length),
    )


def _parts(plan: PackingPlan) -> Iterator[PackingPlan]:
    """The plan, split into consecutive rows of about COPIED_TOKENS tokens."""
    ends = torch.cat([plan.lengths.new_zeros(1), plan.lengths.cumsum(0)])[plan.offsets]  # tokens before each row
    row, rows = 0, len(plan.offsets) - 1
    while row < rows:
        stop = max(row + 1, int(torch.searchsorted(ends, ends[row] + COPIED_TOKENS, right=True)) - 1)
        first, last = int(plan.offsets[row]), int(plan.offsets[stop])
        yield PackingPlan(
            plan.documents[first:last],
            plan.starts[first:last],
            plan.lengths[first:last],
            plan.offsets[row : stop + 1] - first,
        )
        row = stop

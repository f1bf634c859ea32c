"""A data set of documents: its labels and what of it trains; packed as a whole by the plan of a backend's `pack`."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher

from unsloth_ref.types import PackingPlan, Strategy

logger = logging.getLogger(__name__)

LOOK = 1000  # documents of a stream that are looked at for a target
CHUNK = 2**24  # tokens copied at a time; also keeps Arrow's 32-bit offsets from overflowing


def labels_of(example: Mapping[str, Any], completion_only: bool) -> dict[str, Any]:
    """The labels of an example that has none: its tokens, -100 where a mask of it is 0. TRL makes them since 1.7."""
    if "labels" in example:
        return {}
    names = (*(("completion_mask",) if completion_only else ()), "assistant_masks")
    masks = [example[name] for name in names if name in example]
    columns = zip(example["input_ids"], *masks, strict=True)
    return {"labels": [token if all(mask) else -100 for token, *mask in columns]}


def labelled(dataset: Dataset, completion_only: bool) -> Dataset:
    """The data set with a column of labels; its masks are in them."""
    if not has_lists(dataset, "input_ids") or "labels" in dataset.column_names:
        return dataset
    masks = [name for name in ("completion_mask", "assistant_masks") if name in dataset.column_names]
    return dataset.map(labels_of, fn_kwargs={"completion_only": completion_only}, remove_columns=masks)


def with_targets(
    dataset: Dataset, name: str, *, max_length: int | None = None, keep_end: bool = False, drop: bool = False
) -> Dataset:
    """The data set, once it is sure that there is something to train on or to evaluate; what is cut off is logged.

    The first token of a document is no target: nothing foretells it.

    Args:
        dataset: with a column "labels" of lists of integers, a document each.
        name: of the data set, for messages.
        max_length: what a document has beyond so many tokens will be cut off; None for nothing.
        keep_end: whether its first tokens will be, rather than its last.
        drop: whether to leave out the documents without target, which change nothing where documents are kept apart.

    Raises:
        ValueError: no token is a target.
    """
    labels, lengths = _flat(dataset, "labels")
    targets = labels.to_numpy(zero_copy_only=False) != -100
    before = np.concatenate(([0], targets.cumsum()))  # targets before each token
    kept = lengths if max_length is None else np.minimum(lengths, max_length)
    ends = lengths.cumsum() - (0 if keep_end else lengths - kept)
    trains = before[ends] > before[np.minimum(ends - kept + 1, ends)]
    if not trains.any():
        raise ValueError(_no_target(name, f"{len(lengths)}", max_length))
    if (lost := lengths - kept).any():
        logger.warning(
            "%s: %d tokens are cut off %d documents of more than max_length=%d tokens; a larger max_length keeps them "
            "whole, packing=True with packing_strategy='bfd_split' in pieces",
            *(name, lost.sum(), np.count_nonzero(lost), max_length),
        )
    if trains.all():
        return dataset
    logger.warning("%s: %d of %d documents have no target and count for nothing", name, (~trains).sum(), len(trains))
    return dataset.select(np.flatnonzero(trains)) if drop else dataset


def check_vocabulary(dataset: Any, name: str, vocabulary: int | None) -> None:
    """Raise for a token or a label that the model does not have, of which a GPU would only say that it failed.

    Args:
        dataset: one whose columns "input_ids" and "labels", where it has them, are looked at as a whole.
        name: of the data set, for messages.
        vocabulary: how many tokens the model has; None if that is not known.

    Raises:
        ValueError: the first value that is none of them, and its row.
    """
    for column in ("input_ids", "labels"):
        if vocabulary is not None and has_lists(dataset, column):
            values, lengths = _flat(dataset, column)
            _check_tokens(name, column, values.to_numpy(zero_copy_only=False), vocabulary, lengths.cumsum())


def _check_tokens(name: str, column: str, values: np.ndarray, vocabulary: int, ends: np.ndarray, row: int = 0) -> None:
    """Raise for a value outside the vocabulary; rows end at `ends` among the values, and are counted from `row`."""
    wrong = (values < 0) | (values >= vocabulary)
    if column == "labels":
        wrong &= values != -100
    if wrong.any():
        at = int(wrong.argmax())
        row += int(np.searchsorted(ends, at, side="right"))
        raise ValueError(
            f"{name}: got {int(values[at])} in row {row} of column {column!r}; allowed: 0 to {vocabulary - 1}, the "
            f"model's tokens{', or -100' if column == 'labels' else ''}"
        )


def check_as_read(dataset: IterableDataset, name: str, vocabulary: int | None) -> IterableDataset:
    """The stream, which raises as `check_vocabulary` does where such a row is read."""
    if vocabulary is None:
        return dataset
    return dataset.map(_checked, with_indices=True, fn_kwargs={"name": name, "vocabulary": vocabulary})


def _checked(row: dict[str, Any], index: int, name: str, vocabulary: int) -> dict[str, Any]:
    for column in ("input_ids", "labels"):
        values = np.asarray(row.get(column, ()))
        _check_tokens(name, column, values, vocabulary, np.array([len(values)]), index)
    return row


def check_stream(
    rows: Iterable[Mapping[str, Any]],
    name: str,
    *,
    completion_only: bool = False,
    max_length: int | None = None,
    keep_end: bool = False,
) -> None:
    """Look for a target in the first documents of a stream, which is read again from its start to train.

    Args:
        rows: tokenized, with or without labels.
        name: of the data set, for messages.
        completion_only: whether a completion_mask counts, where the rows have no labels yet.
        max_length: as in `with_targets`; None for documents that are cut nowhere.
        keep_end: as in `with_targets`.

    Raises:
        ValueError: the stream ends without a target; where it only begins so, that is logged.
    """
    count = 0
    for row in islice(rows, LOOK):
        labels = (dict(row) | labels_of(row, completion_only))["labels"]
        count += 1
        kept = labels[-max_length:] if max_length and keep_end else labels[:max_length]
        if any(label != -100 for label in kept[1:]):
            return
    if count < LOOK:
        raise ValueError(_no_target(name, f"{count}", max_length))
    logger.warning(_no_target(name, f"the first {count}", max_length))


def check_kept(given: Iterable[Mapping[str, Any]], prepared: Iterable[Mapping[str, Any]], name: str) -> None:
    """Raise if the rows of a stream had labels before they were prepared and have none since.

    Raises:
        ValueError: so they are; TRL before 1.7 packs the tokens alone, and would train on every one.
    """
    if "labels" in next(iter(given)) and "labels" not in next(iter(prepared), ("labels",)):
        raise ValueError(
            f"{name}: got a stream with labels to pack, which the installed trl loses; allowed: a data set that is "
            "held as a whole, packing=False, or a newer trl"
        )


def _no_target(name: str, count: str, max_length: int | None) -> str:
    cut = "" if max_length is None else f" within max_length={max_length} tokens"
    return (
        f"{name}: got no target in {count} documents{cut}; allowed: at least one label that is not -100 after a "
        "document's first token (look at labels, completion_mask and assistant_masks)"
    )


def check_packed_rows(dataset: Dataset, name: str, max_length: int | None) -> None:
    """Raise for rows that were packed before and are longer than a row may be: cutting one would cut documents apart.

    Raises:
        ValueError: the longest row, and what is allowed.
    """
    longest = _flat(dataset, "input_ids")[1].max(initial=0)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"{name}: got a packed row of {longest} tokens; allowed: up to max_length={max_length} (raise it, "
            "or pack the documents anew without the column 'seq_lengths')"
        )


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
    columns = {name: _flat(dataset, name) for name in dataset.column_names}
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


def has_lists(dataset: Any, name: str) -> bool:
    """Whether it is a map-style data set with a column of that name that holds lists of integers."""
    if not isinstance(dataset, Dataset) or name not in dataset.column_names:
        return False
    kind = dataset.data.schema.field(name).type
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def log_packing(dataset: Dataset, packed: Dataset, name: str, max_length: int) -> None:
    """Log how full the rows are."""
    lengths, rows = (_flat(data, "input_ids")[1] for data in (dataset, packed))
    logger.info(
        "%s: %d documents of %d tokens packed into %d rows of %d, %.1f %% full",
        *(name, len(lengths), lengths.sum(), len(rows), max_length, 100 * rows.mean() / max_length),
    )


def _flat(dataset: Dataset, name: str) -> tuple[pa.Array, np.ndarray]:
    """All values of a column of lists one after the other, and how many each list holds."""
    table: Any = dataset.select_columns([name]).with_format("arrow")[:]  # in the order of a selection or shuffle
    column = table.column(name)
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

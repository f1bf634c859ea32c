"""Responses in rows of tokens: found by the tokens of the text before a question and before an answer.

A tokenizer may merge the edge of such a text with its neighbours, so each text has several forms in tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from unsloth_fast.data.labels import labels_of
from unsloth_fast.data.lists import flat
from unsloth_fast.data.packing import COPIED_TOKENS, SPANS
from unsloth_ref.types import IGNORE_INDEX

Forms = tuple[tuple[int, ...], ...]

# What may precede and follow a text in a row, as far as tokenizers merge across its edges.
_BEFORE = ("", "a", ".", " ", "\n", "\n\n")
_AFTER = ("", "a", " a", "A", "1", ".", "\n", "\n\n")


def forms_of(text: str, tokenizer: PreTrainedTokenizerBase, *, exact: bool = True) -> Forms:
    """The sequences of tokens that a text becomes among others.

    A token that holds a part of the text and a part of its neighbours belongs to the form if the neighbours' part is
    whitespace; otherwise the form lacks it, which it may if the text's part is whitespace.

    Args:
        text: the text.
        tokenizer: a tokenizer; for a slow one, the text on its own is the only form.
        exact: whether the whitespace at the ends of the text counts.

    Returns:
        The forms, longest first.
    """
    texts = [text] if exact else [text, text.strip()]
    if not getattr(tokenizer, "is_fast", False):
        found = {tuple(tokenizer(entry, add_special_tokens=False)["input_ids"]) for entry in texts}
    else:
        eos = tokenizer.eos_token or ""
        before = [*_BEFORE, *([eos, f"{eos}\n"] if eos else [])]
        cases = [(first, entry, last) for entry in texts for first in before for last in _AFTER]
        encoded = tokenizer(
            ["".join(case) for case in cases], add_special_tokens=False, return_offsets_mapping=True, padding=False
        )
        rows = zip(cases, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        found = {_form(*case, ids, offsets) for case, ids, offsets in rows}
    return tuple(sorted(found - {()}, key=lambda form: (-len(form), form)))


def _form(
    before: str, text: str, after: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """The tokens of the text in this context; none if a neighbour took more of it than whitespace."""
    whole = before + text + after
    start, end = len(before), len(before) + len(text)
    kept = []
    for index, (first, last) in enumerate(offsets):
        outside = whole[first : min(start, last)] + whole[max(end, first) : last]
        if first < last and max(first, start) < min(last, end) and not outside.strip():
            kept.append(index)
    core = (start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip()))
    if not text.strip():
        core = (start, end)
    if not kept or offsets[kept[0]][0] > core[0] or offsets[kept[-1]][1] < core[1]:
        return ()
    return tuple(ids[kept[0] : kept[-1] + 1])


@dataclass(frozen=True)
class ResponseLabels:
    """Labels that keep only the targets of responses: a function of a row, or of a batch of rows, for `Dataset.map`.

    A response starts after a text of `response` and ends before the next text of either kind, or with its document:
    what follows it in its turn, such as the end token, belongs to it.

    Attributes:
        instruction: the forms of the text before what a user says; empty to end responses at the document's end.
        response: the forms of the text before a response.
        last_only: whether only the last response of each document, of those with a token, has targets.
    """

    instruction: Forms
    response: Forms
    last_only: bool = False

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """The labels of one row (input_ids [S]), or of several ([B, S], or a list of them).

        Args:
            rows: lists, arrays or tensors of integers; may have "labels" and masks.

        Returns:
            {"labels": ...}, as tensors where input_ids are tensors.
        """
        ids, names = rows["input_ids"], [name for name in _USED if name in rows]
        if len(ids) and np.ndim(ids[0]):
            each = [self._row({name: rows[name][index] for name in names}) for index in range(len(ids))]
            return {"labels": torch.stack(each) if isinstance(ids, torch.Tensor) else each}
        return {"labels": self._row({name: rows[name] for name in names})}

    def _row(self, given: Mapping[str, Any]) -> Any:
        row = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in given.items()}
        labels = (row | labels_of(row, completion_only=True))["labels"]
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        mask = self.mask(ids, row.get("seq_lengths") or [len(ids)])
        found = np.where(mask, np.asarray(labels, dtype=np.int64), IGNORE_INDEX)
        tokens = given["input_ids"]
        return torch.from_numpy(found).to(tokens.device) if isinstance(tokens, torch.Tensor) else found.tolist()

    def mask(self, ids: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
        """Which tokens belong to a response that has targets.

        Args:
            ids: [S], concatenated documents.
            lengths: the length of each document; what is left over is one more.

        Returns:
            [S] bool.
        """
        starts = np.cumsum([0, *lengths])
        starts = starts[starts < len(ids)]
        document = np.zeros(len(ids), np.int64)
        np.add.at(document, starts[1:], 1)
        document = document.cumsum()
        asked, answered = (longest_matches(ids, document, forms) for forms in (self.instruction, self.response))
        answered[asked > answered] = 0
        places = np.arange(len(ids))
        stops = np.where((asked > 0) | (answered > 0), places, -1)
        stops[starts] = starts
        begins = np.full(len(ids) + 1, -1)
        found = np.flatnonzero(answered)
        begins[found + answered[found]] = found + answered[found]
        begun = np.maximum.accumulate(begins[: len(ids)])
        mask = begun > np.maximum.accumulate(stops)
        if self.last_only and mask.any():
            last = np.full(document[-1] + 1, -1)
            np.maximum.at(last, document[mask], begun[mask])
            mask &= begun == last[document]
        return mask


def mask_cut_documents(packed: Dataset, labels: ResponseLabels) -> Dataset:
    """Mask the labels of packed rows whose documents were cut, by the responses of the whole documents.

    Args:
        packed: rows of `pack_dataset` with a column "document_spans", in any order.
        labels: finds the responses.

    Returns:
        The rows with other labels.
    """
    ids, before, spans = (flat(packed, name)[0].to_numpy() for name in ("input_ids", "labels", SPANS))
    document, start, size = spans.reshape(-1, 3).T
    order = np.lexsort((start, document))
    # The place, in the rows, of each token in the order of the documents.
    shifts = (size.cumsum() - size)[order] - (size[order].cumsum() - size[order])
    places = np.arange(len(ids)) + np.repeat(shifts, size[order])
    after, done = np.full(len(ids), IGNORE_INDEX), 0
    wholes = np.bincount(document, size).astype(np.int64)
    for lengths in np.array_split(wholes, 1 + len(ids) // COPIED_TOKENS):
        part = places[done : done + lengths.sum()]
        after[part] = np.where(labels.mask(ids[part], lengths.tolist()), before[part], IGNORE_INDEX)
        done += len(part)
    ends = flat(packed, "input_ids")[1].cumsum()
    begins = np.append(0, ends)

    def of_rows(indices: Sequence[int]) -> dict[str, Any]:
        return {"labels": [after[begins[index] : ends[index]] for index in indices]}

    fingerprint = Hasher.hash((packed._fingerprint, labels))
    return packed.map(lambda _, indices: of_rows(indices), with_indices=True, batched=True, new_fingerprint=fingerprint)


_USED = ("input_ids", "labels", "seq_lengths", "completion_mask", "assistant_masks")


def longest_matches(ids: np.ndarray, document: np.ndarray, forms: Iterable[Sequence[int]]) -> np.ndarray:
    """The length of the longest form that begins at each token and lies within one document, [S]; 0 for none."""
    lengths = np.zeros(len(ids), np.int64)
    for form in forms:
        size, count = len(form), len(ids) - len(form) + 1
        if count <= 0:
            continue
        found = document[:count] == document[size - 1 :]
        for offset, token in enumerate(form):
            found &= ids[offset : offset + count] == token
        lengths[:count] = np.where(found, np.maximum(lengths[:count], size), lengths[:count])
    return lengths

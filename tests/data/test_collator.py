"""The collator: the documents of a batch in one row, and the labels of documents that a batch repeats."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import unsloth_fast.training
import unsloth_ref.training
from unsloth_fast.data.collator import EXAMPLE_ENDS, PackedCollator, collators, without_ends, without_repeated

PACKAGES = [unsloth_ref.training, unsloth_fast.training]
EXAMPLES = [{"input_ids": [3, 4, 5], "labels": [3, -100, 5]}, {"input_ids": [6, 7], "labels": [6, 7]}]
ROW = torch.tensor([[1, 2, 3, 4, 5, 6]])


def packed(package: ModuleType = unsloth_ref.training, **options: Any) -> PackedCollator:
    """The collator with a backend's `collate`."""
    return PackedCollator(pad_token_id=0, padding_free=True, collate=package.collate, vocab_size=48, **options)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_documents_are_concatenated_and_positions_restart(package: ModuleType) -> None:
    """The first token of each document is not a target; nothing is padded, so there is no attention mask."""
    batch = packed(package)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 5, -100, 7]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert not batch.keys() & {"attention_mask", EXAMPLE_ENDS}


def test_packed_rows_keep_their_documents_apart() -> None:
    """A column seq_lengths holds the length of each document in a row."""
    row = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6], "seq_lengths": [1, 3]}
    batch = packed()([row, {"input_ids": [7], "labels": [7], "seq_lengths": [1]}])
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(("completion_only", "expected"), [(True, [-100, -100, 5]), (False, [-100, 4, 5])])
def test_examples_without_labels_get_them_from_their_masks(completion_only: bool, expected: list[int]) -> None:
    example = {"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}
    assert packed(completion_only=completion_only)([example])["labels"].tolist() == [expected]
    assert example == {"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}


def test_the_ends_of_the_examples_are_in_the_batch_on_request() -> None:
    """The batch has the end of each example in the row, however many documents the example holds."""
    rows = [EXAMPLES[0] | {"seq_lengths": [1, 2]}, EXAMPLES[1] | {"seq_lengths": [2]}]
    assert packed(with_ends=True)(rows)[EXAMPLE_ENDS].tolist() == [3, 5]


def test_the_ends_are_no_input_of_the_model() -> None:
    """The batch itself stays as it is."""
    batch = {"input_ids": ROW, EXAMPLE_ENDS: torch.tensor([2, 6])}
    inputs, ends = without_ends(batch)
    assert inputs == {"input_ids": ROW} and ends is batch[EXAMPLE_ENDS]
    assert without_ends(inputs) == (inputs, None)


def test_a_row_is_filled_up_to_a_multiple() -> None:
    batch = packed(pad_to_multiple_of=8)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7, 0, 0, 0]]
    assert batch["labels"][0, 5:].tolist() == [-100] * 3


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    """It is refused before the batch is copied to a GPU, which would only report a failure."""
    with pytest.raises(ValueError, match=r"^labels: got 48 .* allowed: 0 to 47, or -100"):
        packed()([{"input_ids": [3, 4], "labels": [3, 48]}])


def trainer_with(collator: Any, *, padding_free: bool) -> Any:
    """The attributes of a trainer that decide about its collators."""
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=48))
    return SimpleNamespace(
        data_collator=collator,
        padding_free=padding_free,
        args=SimpleNamespace(pad_to_multiple_of=8),
        backend=SimpleNamespace(training=unsloth_ref.training),
        model=SimpleNamespace(config=config),
    )


def test_a_users_collator_makes_all_batches() -> None:
    given = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    assert all(found is given for found in collators(trainer_with(given, padding_free=False), False, own=True))


@pytest.mark.parametrize("completion_only", [False, True])
def test_documents_are_concatenated_by_the_backend_where_batches_are_padding_free(completion_only: bool) -> None:
    given = DataCollatorForLanguageModeling(pad_token_id=0)
    usual, _ = collators(trainer_with(given, padding_free=True), completion_only, own=False)
    assert usual == packed(pad_to_multiple_of=8, completion_only=completion_only, with_ends=True)


@pytest.mark.parametrize("padding_free", [False, True])
def test_trls_collator_becomes_one_that_pads(padding_free: bool) -> None:
    """The result is a copy; with packing TRL builds its collator padding-free."""
    given = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    usual, padding = collators(trainer_with(given, padding_free=padding_free), False, own=False)
    batch = padding(EXAMPLES)
    assert (usual is padding) is not padding_free
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert given.padding_free


@pytest.mark.parametrize(
    ("ends", "new", "kept"),
    [
        ([2, 5, 6], 3, 6),
        ([2, 5, 6], 7, 6),
        ([2, 5, 6], 2, 5),
        ([2, 5, 6], 1, 2),
        ([2, 5, 6], 0, 0),
        ([2, 5, 6], -3, 0),
    ],
)
def test_repeated_examples_of_one_row_lose_their_targets(ends: list[int], new: int, kept: int) -> None:
    """The result is a copy."""
    found = without_repeated(ROW, torch.tensor(ends), new)
    assert found.tolist() == [[*range(1, kept + 1), *[-100] * (6 - kept)]]
    assert ROW.tolist() == [[1, 2, 3, 4, 5, 6]] and found is not ROW


@pytest.mark.parametrize(("new", "kept"), [(3, 3), (5, 3), (2, 2), (0, 0), (-1, 0)])
def test_repeated_examples_lose_their_targets_row_by_row(new: int, kept: int) -> None:
    labels: Tensor = torch.arange(6).reshape(3, 2)
    found = without_repeated(labels, None, new)
    assert torch.equal(found[:kept], labels[:kept]) and (found[kept:] == -100).all()
    assert labels.tolist() == [[0, 1], [2, 3], [4, 5]]

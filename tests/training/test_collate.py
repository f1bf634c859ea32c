"""Collation, compared with the documents one by one in a float64 Llama, and with TRL's collator."""

from itertools import chain
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import unsloth_fast.training
import unsloth_ref.training
from tests import tiny
from unsloth_ref import kernels
from unsloth_ref.types import IGNORE_INDEX

PACKAGES = [unsloth_ref.training, unsloth_fast.training]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)

# Two layers of sums of at most 48 terms, norms and a softmax, of values below 10: a few hundred roundings of float64.
EXACT = 1000 * 2.0**-53
LENGTHS = [5, 2, 1, 3]


def documents() -> list[list[int]]:
    """Four documents of random words."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 48, (length,), generator=generator).tolist() for length in LENGTHS]


def loss_of(labels: Tensor, **inputs: Any) -> float:
    """The mean loss of a tiny Llama, computed in float64."""
    model = tiny.model(dtype=torch.float64)
    with tiny.KeepFloat64(), torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return float(unsloth_ref.training.next_token_loss(logits, labels, cross_entropy=kernels.cross_entropy))


def padded_loss() -> float:
    """The loss of one row per document, with padding and a mask."""
    rows = [torch.tensor(document) for document in documents()]
    tokens, labels, mask = (
        torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=filling)
        for found, filling in ((rows, 0), (rows, IGNORE_INDEX), ([torch.ones_like(row) for row in rows], 0))
    )
    return loss_of(labels, input_ids=tokens, attention_mask=mask)


@each_package
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("multiple", [None, 16])
def test_the_loss_of_a_row_is_that_of_its_documents(package: ModuleType, packed: bool, multiple: int | None) -> None:
    """Eleven tokens have seven targets, whether the documents are one example or four, and with or without padding."""
    found = documents()
    examples: list[dict[str, Any]] = [{"input_ids": document} for document in found]
    if packed:
        examples = [{"input_ids": [*chain(*found)], "seq_lengths": LENGTHS}]
    batch = package.collate(examples, pad_to_multiple_of=multiple)
    assert int(package.count_targets([batch.labels])) == 7
    inputs = {name: value for name, value in batch.as_dict().items() if name in ("input_ids", "position_ids")}
    assert abs(loss_of(batch.labels, **inputs) - padded_loss()) < EXACT


@pytest.mark.parametrize("mistake", ["boundaries unmasked", "positions run on", "all-ones mask"])
def test_a_wrong_part_of_a_batch_changes_the_loss(mistake: str) -> None:
    """Ten targets instead of seven, or documents that see each other, change the loss by more than 1e-3."""
    batch = unsloth_ref.training.collate([{"input_ids": document} for document in documents()])
    labels, inputs = batch.labels, {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if mistake == "boundaries unmasked":
        labels = batch.input_ids
        assert int(unsloth_ref.training.count_targets([labels])) == 10
    elif mistake == "positions run on":
        del inputs["position_ids"]
    else:
        inputs["attention_mask"] = torch.ones_like(batch.input_ids)
    assert abs(loss_of(labels, **inputs) - padded_loss()) > 1e-3


@each_package
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_as_trl_without_padding(package: ModuleType, packed: bool) -> None:
    """Tokens, labels and positions are those of TRL's padding-free collator."""
    labels = [[IGNORE_INDEX, *document[1:]] for document in documents()]
    examples: list[dict[str, Any]] = [
        {"input_ids": document, "labels": own} for document, own in zip(documents(), labels, strict=True)
    ]
    if packed:
        joined = {name: [*chain(*(example[name] for example in examples))] for name in ("input_ids", "labels")}
        examples = [{**joined, "seq_lengths": LENGTHS}, {**joined, "seq_lengths": LENGTHS}]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    ours = package.collate(examples).as_dict()
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(ours[name], theirs[name]), name


@each_package
def test_a_batch_moves_to_a_device(package: ModuleType) -> None:
    """All tensors move; the length of the longest document stays an integer."""
    batch = package.collate([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in vars(moved).values() if isinstance(tensor, Tensor)} == {"meta"}
    assert moved.max_seqlen == 2 and moved.labels.shape == (1, 3)
    assert batch.labels.device.type == "cpu"


@each_package
def test_empty_documents_and_padding(package: ModuleType) -> None:
    """A document without tokens is dropped; the padding is one document, not one per token."""
    examples = [{"input_ids": torch.tensor([1, 2, 3, 4, 5]), "seq_lengths": [3, 0, 2]}, {"input_ids": []}]
    batch = package.collate(examples, pad_to_multiple_of=8, pad_token_id=9, vocab_size=10)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 5, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3
    given = batch.as_dict()
    assert "attention_mask" not in given
    assert given["cu_seq_lens_q"] is given["cu_seq_lens_k"] is batch.cu_seqlens
    assert given["max_length_q"] == given["max_length_k"] == 3


@each_package
@pytest.mark.parametrize(
    ("examples", "options", "error", "why"),
    [
        ([], {}, ValueError, "^examples: got no tokens; allowed: at least one"),
        ([{"input_ids": []}], {}, ValueError, "^examples: got no tokens; allowed: at least one"),
        ([{"text": "w1"}], {}, ValueError, "^examples: got example 0 with text; allowed: examples with input_ids"),
        (
            [{"input_ids": [1], "labels": [1, 2]}],
            {},
            ValueError,
            "^labels: got 2 labels in example 0; allowed: 1, one per token",
        ),
        (
            [{"input_ids": [1]}, {"input_ids": [1, 2], "seq_lengths": [3]}],
            {},
            ValueError,
            r"^seq_lengths: got \[3\] in example 1; allowed: non-negative integers that sum to 2, its number of tokens",
        ),
        ([{"input_ids": [1, 2], "seq_lengths": [3, -1]}], {}, ValueError, r"^seq_lengths: got \[3, -1\]"),
        ([{"input_ids": [1, 7]}], {"vocab_size": 7}, ValueError, "^input_ids: got 7 at token 1.*allowed: 0 to 6$"),
        (
            [{"input_ids": [1, 2], "labels": [1, -1]}],
            {"vocab_size": 7},
            ValueError,
            "^labels: got -1 at token 1 of the batch; allowed: 0 to 6, or -100",
        ),
        ([{"input_ids": [1]}], {"pad_to_multiple_of": 0}, ValueError, "^pad_to_multiple_of: got 0"),
        ([{"input_ids": [1]}], {"pad_to_multiple_of": 2.0}, TypeError, r"^pad_to_multiple_of: got 2\.0"),
    ],
)
def test_errors_name_the_argument_and_its_value(
    package: ModuleType, examples: Any, options: dict[str, Any], error: type[Exception], why: str
) -> None:
    """Errors are raised on the CPU, before the batch is copied to a device."""
    with pytest.raises(error, match=why):
        package.collate(examples, **options)
